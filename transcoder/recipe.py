"""Recipes: which Hugging Face tensors are which Megatron tensors, as tables without code.

A `Rule` lists the same elements twice, once as Megatron stores them and once as Hugging Face does; each side is a
name and a layout (`layout.py`). `{l}` in a name is the axis `l` spelled in the name; `{m+l}` is the axis `m`, counted
from the size of `l` on. Axis sizes, guards and model fields are arithmetic over config fields, evaluated by a walker
that knows a dozen kinds of nodes and nothing else.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from operator import add
from typing import Any

from transcoder.errors import Problem, refuse
from transcoder.layout import Layout, parse

Values = Mapping[str, Any]
Variants = Mapping[str, Mapping[str, str]]  # name → choice → the tensor that shows it; the first is the default
_NAME_AXIS = re.compile(r"\{([a-z_]+)(?:\+(\w+))?\}")


@dataclass(frozen=True, slots=True)
class Side:
    """One spelling of a tensor: its name pattern and its layout."""

    name: str
    layout: Layout

    @property
    def name_axes(self) -> tuple[str, ...]:
        """Axes spelled in the name, in order."""
        return _spelling(self.name)[1]

    def named(self, index: Mapping[str, int]) -> str:
        """The name for one choice of its axes.

        >>> side("model.layers.{l}.a.weight h").named({"l": 3})
        'model.layers.3.a.weight'
        """
        return self.spelled(tuple(index[axis] for axis in self.name_axes))

    def spelled(self, at: tuple[int, ...]) -> str:
        """The name for the values of `name_axes`.

        >>> side("model.layers.{l}.a.weight h").spelled((3,))
        'model.layers.3.a.weight'
        """
        text, _, starts = _spelling(self.name)
        return text % (tuple(map(add, at, starts)) if any(starts) else at)

    def shifted(self, sizes: Mapping[str, int]) -> Side:
        """The side with numbers for the sizes that its name counts from.

        >>> side("model.layers.{m+l}.enorm.weight h").shifted({"l": 61}).named({"m": 0})
        'model.layers.61.enorm.weight'
        """
        if "+" not in self.name:
            return self
        name = _NAME_AXIS.sub(lambda match: f"{{{match[1]}+{sizes[match[2]]}}}" if match[2] else match[0], self.name)
        return Side(name, self.layout)


@cache
def _spelling(name: str) -> tuple[str, tuple[str, ...], tuple[int, ...]]:
    """A name as a format of numbers, its axes, and where each counts from."""
    matches = list(_NAME_AXIS.finditer(name))
    text = _NAME_AXIS.sub("%d", name.replace("%", "%%"))
    return text, tuple(match[1] for match in matches), tuple(_start(match[2]) for match in matches)


def _start(text: str | None) -> int:
    """A side is spelled once `shifted` has put numbers for sizes."""
    return int(text) if text and text.isdigit() else 0


@dataclass(frozen=True, slots=True)
class Rule:
    """The same elements on both sides; `only`: a guard, asked per layer; `stage`: where layerless tensors live."""

    mcore: tuple[Side, ...]
    hf: tuple[Side, ...]
    only: str = ""
    stage: str = "first"
    dtype: str = ""  # that Megatron stores whatever the model's is; the Hugging Face file may have either
    plus: int = 0  # Megatron stores the Hugging Face value plus this
    alias: bool = False  # another copy of what a rule without this mark brings: compared, not stored

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
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of config fields, where they are not None
    outgoing: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # guard → fields of an export's config.json
    runs: Mapping[str, str] = field(default_factory=dict)  # as `model`, of what only `runtime/switches.py` has


class Field(str):
    """An expression over a Hugging Face config for one of Megatron's fields, and what follows from it the other way."""

    back: Mapping[str, str]


def field_of(text: str, **back: str) -> Field:
    """A field of Megatron's configuration; back: Hugging Face fields as expressions over Megatron's."""
    found = Field(text)
    found.back = back
    return found


def side(text: str) -> Side:
    """A side from "name layout"."""
    name, _, layout = text.partition(" ")
    return Side(name, parse(layout.strip()))


def rule(mcore: str | tuple[str, ...], *hf: str, **marks: Any) -> Rule:
    """A rule from texts; the Megatron side (or sides) first, then the Hugging Face sides in the order of their parts.

    marks: `only`, `stage`, `dtype`, `plus`, `alias`, as in `Rule`.
    """
    stored = (mcore,) if isinstance(mcore, str) else mcore
    return Rule(tuple(side(text) for text in stored), tuple(side(text) for text in hf), **marks)


def pattern(name: str, sizes: Mapping[str, int] | None = None) -> re.Pattern[str]:
    """What matches the names that a name with axes spells; `*` at the end stands for any rest.

    sizes: of axes, for names that count on from one.

    >>> bool(pattern("model.layers.{l}.a.weight").fullmatch("model.layers.12.a.weight"))
    True
    >>> bool(pattern("model.layers.{m+l}.*", {"m": 1, "l": 61}).fullmatch("model.layers.60.a.weight"))
    False
    """
    stem = name.removesuffix("*")
    parts = _NAME_AXIS.split(stem)
    texts = [re.escape(parts[0])]
    for axis, start, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        texts += [_numbers(axis, start, sizes or {}), re.escape(text)]
    return re.compile("".join(texts) + (".*" if name != stem else ""))


def _numbers(axis: str, start: str | None, sizes: Mapping[str, int]) -> str:
    if start is None or start not in sizes:
        return r"\d+"
    return "(?:" + "|".join(str(sizes[start] + i) for i in range(min(sizes[axis], 1000))) + ")"


def moved(
    rules: Iterable[Rule],
    only: str = "",
    mcore: tuple[str, str] = ("", ""),
    hf: tuple[str, str] = ("", ""),
    **marks: Any,
) -> tuple[Rule, ...]:
    """The rules under one more guard and other prefixes: the start of a name, and what replaces it; other marks."""
    return tuple(
        replace(
            each,
            mcore=tuple(Side(_restarted(side.name, *mcore), side.layout) for side in each.mcore),
            hf=tuple(Side(_restarted(side.name, *hf), side.layout) for side in each.hf),
            only=_both(each.only, only),
            **marks,
        )
        for each in rules
    )


def moved_state(
    modules: Iterable[tuple[str, str]], only: str = "", mcore: tuple[str, str] = ("", "")
) -> tuple[tuple[str, str], ...]:
    """The modules that have an extra state, under one more guard and another prefix."""
    return tuple((_restarted(name, *mcore), _both(guard, only)) for name, guard in modules)


def _restarted(name: str, start: str, new: str) -> str:
    return new + name.removeprefix(start) if name.startswith(start) else name


def _both(one: str, two: str) -> str:
    return f"({one}) and ({two})" if one and two else one or two


def evaluate(expression: str, values: Values) -> Any:
    """The value of a config expression; a name that `values` lacks is None. Raises InputError where it has none.

    >>> evaluate("head_dim or hidden // heads", {"hidden": 64, "heads": 8})
    8
    """
    try:
        return _value(_parsed(expression), values)
    except (TypeError, ZeroDivisionError, OverflowError) as error:
        problem = Problem(file="config.json", message=f"{expression}: {error}", expected="fields of other types")
        raise refuse("config", "the config does not describe a model", [problem]) from error


@cache
def _parsed(expression: str) -> ast.expr:
    return ast.parse(expression, mode="eval").body


_BINARY: Mapping[type, Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.FloorDiv: lambda a, b: a // b,
    ast.Mod: lambda a, b: a % b,
    ast.Pow: lambda a, b: float(a) ** b if 0 < a < 1e18 else None,
}
_UNARY: Mapping[type, Callable[[Any], Any]] = {ast.Not: lambda a: not a, ast.USub: lambda a: -a}
_COMPARE: Mapping[type, Callable[[Any, Any], bool]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Is: lambda a, b: a is b,
    ast.IsNot: lambda a, b: a is not b,
    ast.Lt: lambda a, b: a < b,
    ast.GtE: lambda a, b: a >= b,
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
    if isinstance(node, ast.UnaryOp) and type(node.op) in _UNARY:
        return _UNARY[type(node.op)](_value(node.operand, values))
    if isinstance(node, ast.BinOp) and type(node.op) in _BINARY:
        return _BINARY[type(node.op)](_value(node.left, values), _value(node.right, values))
    if isinstance(node, ast.Compare) and len(node.ops) == 1 and type(node.ops[0]) in _COMPARE:
        return _COMPARE[type(node.ops[0])](_value(node.left, values), _value(node.comparators[0], values))
    if isinstance(node, ast.IfExp):
        return _value(node.body if _value(node.test, values) else node.orelse, values)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _CALLS:
        return _CALLS[node.func.id](*(_value(argument, values) for argument in node.args))
    if isinstance(node, ast.Subscript):
        return _item(_value(node.value, values), _value(node.slice, values))
    if isinstance(node, ast.Tuple):
        return tuple(_value(item, values) for item in node.elts)
    raise ValueError(f"{ast.unparse(node)!r} is not allowed in a config expression")


def _places(container: Any, wanted: Any) -> Any:
    """Where a list has a value; None for what is no list."""
    return [i for i, item in enumerate(container) if item == wanted] if isinstance(container, list) else None


_CALLS: Mapping[str, Callable[..., Any]] = {
    "len": lambda container: len(container) if isinstance(container, list | str) else None,
    "places": _places,
}


def _item(container: Any, place: Any) -> Any:
    """An entry of a list or a letter of a text; None where there is none."""
    inside = isinstance(container, list | tuple | str) and type(place) is int and 0 <= place < len(container)
    return container[place] if inside else None


def _boolean(node: ast.BoolOp, values: Values) -> Any:
    stop = isinstance(node.op, ast.Or)
    result = None
    for item in node.values:
        result = _value(item, values)
        if bool(result) is stop:
            break
    return result
