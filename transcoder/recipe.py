"""Recipes: which Hugging Face tensors are which Megatron tensors, as tables without code.

A `Rule` lists the same elements twice, once as Megatron stores them and once as Hugging Face does; each side is a
name and a layout (`layout.py`). `{l}` in a name is the axis `l` spelled in the name. Axis sizes, guards and model
fields are arithmetic over config fields, evaluated by a walker that knows a dozen kinds of nodes and nothing else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from transcoder.layout import Layout, parse

Values = Mapping[str, Any]
Variants = Mapping[str, Mapping[str, str]]  # name → choice → key pattern that shows it; the first choice is the default
_NAME_AXIS = re.compile(r"\{([a-z_]+)\}")


@dataclass(frozen=True, slots=True)
class Side:
    """One spelling of a tensor: its name pattern and its layout."""

    name: str
    layout: Layout

    @property
    def name_axes(self) -> tuple[str, ...]:
        """Axes spelled in the name, in order."""
        return tuple(_NAME_AXIS.findall(self.name))

    def named(self, index: Mapping[str, int]) -> str:
        """The name for one choice of its axes.

        >>> side("model.layers.{l}.a.weight h").named({"l": 3})
        'model.layers.3.a.weight'
        """
        return _NAME_AXIS.sub(lambda match: str(index[match[1]]), self.name)


@dataclass(frozen=True, slots=True)
class Rule:
    """The same elements on both sides; `only`: a guard, asked per layer; `stage`: where layerless tensors live."""

    mcore: tuple[Side, ...]
    hf: tuple[Side, ...]
    only: str = ""
    stage: str = "first"
    dtype: str = ""  # of tensors that keep theirs whatever the model's is

    @property
    def axes(self) -> frozenset[str]:
        """Every axis of both sides, filler apart."""
        sides = (*self.mcore, *self.hf)
        return frozenset(axis for side in sides for axis in (*side.name_axes, *side.layout.axes))

    @property
    def label(self) -> str:
        """How messages name the rule: the Megatron spelling."""
        return " + ".join(f"{side.name} {side.layout.text}" for side in self.mcore)


@dataclass(frozen=True, slots=True)
class Recipe:
    """One architecture family: everything that is known about it, as data."""

    name: str
    hf: Mapping[str, str]  # Hugging Face class → model_type
    axes: Mapping[str, str]
    rules: tuple[Rule, ...]
    extra_state: tuple[tuple[str, str], ...]
    model: Mapping[str, str]
    ignore: tuple[str, ...] = ()
    checks: Mapping[str, str] = field(default_factory=dict)  # expression → why the result is "weights only"
    kinds: Mapping[str, str] = field(default_factory=dict)  # kind of layer → expression over the config and `l`
    hf_variants: Variants = field(default_factory=dict)
    mcore_variants: Variants = field(default_factory=dict)


def side(text: str) -> Side:
    """A side from "name layout"."""
    name, _, layout = text.partition(" ")
    return Side(name, parse(layout.strip()))


def rule(mcore: str, *hf: str, only: str = "", stage: str = "first", dtype: str = "") -> Rule:
    """A rule from texts; the Megatron side first, then the Hugging Face sides in the order of their parts."""
    return Rule((side(mcore),), tuple(side(text) for text in hf), only, stage, dtype)


def moved(rules: Iterable[Rule], mcore: str, hf: tuple[str, str], only: str) -> tuple[Rule, ...]:
    """The rules under other prefixes and one more guard.

    mcore: put before every Megatron name. hf: the start of a Hugging Face name and what replaces it.
    """
    return tuple(
        replace(
            each,
            mcore=tuple(Side(mcore + side.name, side.layout) for side in each.mcore),
            hf=tuple(Side(_restarted(side.name, *hf), side.layout) for side in each.hf),
            only=f"({each.only}) and {only}" if each.only else only,
        )
        for each in rules
    )


def _restarted(name: str, start: str, new: str) -> str:
    return new + name.removeprefix(start) if name.startswith(start) else name


def evaluate(expression: str, values: Values) -> Any:
    """The value of a config expression; a name that `values` lacks is None.

    >>> evaluate("head_dim or hidden // heads", {"hidden": 64, "heads": 8})
    8
    """
    return _value(_parsed(expression), values)


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
}
_COMPARE: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.In: lambda a, b: a in b,
    ast.NotIn: lambda a, b: a not in b,
}


def _value(node: ast.expr, values: Values) -> Any:
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return values.get(node.id)
    if isinstance(node, ast.BoolOp):
        return _boolean(node, values)
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not):
        return not _value(node.operand, values)
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        return _COMPARE[type(node.ops[0])](_value(node.left, values), _value(node.comparators[0], values))
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, values) else node.orelse, values)
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, values) for item in node.elts)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in a config expression")


def _boolean(node: ast.BoolOp, values: Values) -> Any:
    stop = isinstance(node.op, ast.Or)
    result = None
    for item in node.values:
        result = _value(item, values)
        if bool(result) is stop:
            break
    return result
