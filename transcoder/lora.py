"""What an adapter updates, as one Megatron linear after the other: read from PEFT's updates or from Megatron's keys."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product as combinations
from typing import Any

from transcoder.errors import Problem, refuse
from transcoder.formats.peft import PREFIX
from transcoder.planner import Family, Model
from transcoder.recipe import Side
from transcoder.updates import Update

PARTS = {"linear_qkv": ("q", "k", "v"), "linear_fc1": ("gate", "up")}  # of fused modules, as the rules order them
A, B = "linear_in.weight", "linear_out.weight"
Stored = Mapping[str, tuple[Any, tuple[int, ...], Any]]  # key → dtype, shape, places


@dataclass(frozen=True, slots=True)
class Form:
    """How one module is adapted: the rank for each Hugging Face side of its rule, 0 for those without an update."""

    ranks: tuple[int, ...]
    split: bool  # whether each part of a fused module has an adapter of its own
    cut: int = 1  # TP size in whose halves B of gate or up alone is stored
    suffix: str = ""  # of PEFT's module name, for stacked experts


Adapted = dict[int, dict[int, Form]]  # number of the base family → layer, or -1 where there is none → form


def adapted_by(base: Model, updates: Mapping[str, Update], split: bool, tp: int) -> Adapted:
    """What a PEFT adapter updates. Raises InputError where it updates only some of what has one adapter in Megatron."""
    touched = {id(base.hf[name].family) for name in updates}
    found: Adapted = {}
    problems: list[Problem] = []
    for number, family in enumerate(base.families):
        for layer in _layers(family) if id(family) in touched else ():
            own = [[updates.get(name) for name in _names(family, side, layer)] for side in family.rule.hf]
            if any(update for side in own for update in side):
                problems += _misfits(family, layer, own)
                found.setdefault(number, {})[layer] = _form(family, own, split, tp)
    if problems:
        raise refuse("adapter", "Megatron has no adapter for these updates; --merge-adapter merges them", problems)
    return found


def _layers(family: Family) -> tuple[int, ...]:
    return family.layers if any("l" in side.name_axes for side in family.rule.mcore) else (-1,)


def _names(family: Family, side: Side, layer: int) -> Iterator[str]:
    """Names of one side in a layer, those of all experts."""
    others = [axis for axis in side.name_axes if axis != "l"]
    for values in combinations(*(range(family.sizes[axis]) for axis in others)):
        yield side.named({"l": layer, **dict(zip(others, values, strict=True))})


def _misfits(family: Family, layer: int, own: list[list[Update | None]]) -> Iterator[Problem]:
    first = next(_names(family, family.rule.hf[0], layer))
    for side, updates in zip(family.rule.hf, own, strict=True):
        if len({update.rank if update else 0 for update in updates}) > 1:
            expected = f"an update of the same rank for each of the {len(updates)}"
            yield Problem(tensor=next(_names(family, side, layer)), expected=expected, found="other ranks, or none")
    if not adaptable(family):
        yield Problem(tensor=first, expected="the matrix of one linear", found=family.rule.label)
    if any(update and update.magnitude is not None for updates in own for update in updates):
        yield Problem(tensor=first, expected="plain LoRA", found="DoRA's magnitudes")


def _form(family: Family, own: list[list[Update | None]], split: bool, tp: int) -> Form:
    firsts = [next(iter(updates), None) for updates in own]
    ranks = tuple(update.rank if update else 0 for update in firsts)
    suffix = next((".base_layer" * update.module.count(".base_layer") for update in firsts if update), "")
    return Form(ranks, True, tp) if split and splits(family) else Form(ranks, False, suffix=suffix)


def module_of(family: Family) -> str:
    """The Megatron module's own name, as `linear_qkv`."""
    return family.rule.mcore[0].name.removesuffix(".weight").rpartition(".")[2]


def adaptable(family: Family) -> bool:
    """Whether a family's weight is the matrix of one Megatron linear."""
    rule, name = family.rule, family.rule.mcore[0].name
    matrix = len(rule.mcore) == 1 and len(rule.mcore[0].layout.dims) == 2 and bool(rule.hf)
    return matrix and not rule.alias and not rule.plus and name.endswith(".weight") and "embedding" not in name


def splits(family: Family) -> bool:
    """Whether the canonical form has an adapter for each part; experts have one for gate and up."""
    parts = PARTS.get(module_of(family), ())
    return len(family.rule.hf) == len(parts) and "e" not in family.rule.mcore[0].name_axes


def adapted_in(base: Model, tensors: Stored, known: Container[str] = ()) -> Adapted:
    """What the keys of a Megatron adapter checkpoint update, which has the dialect of `base`.

    known: the tensors of the PEFT adapter that it was made from, if any: other parts of fused modules are zero.
    """
    found: Adapted = {}
    for number, family in enumerate(base.families):
        for layer in _layers(family) if adaptable(family) else ():
            index = dict.fromkeys(family.mcore[0].name_axes, 0) | {"l": layer}
            stem = family.mcore[0].named(index).removesuffix(".weight") + ".adapter"
            if form := _found(family, stem, tensors):
                found.setdefault(number, {})[layer] = _known(family, layer, form, known)
    return _wrapped(base, found)


def _known(family: Family, layer: int, form: Form, known: Container[str]) -> Form:
    first = [next(_names(family, side, layer)).removesuffix(".weight") for side in family.rule.hf]
    there = [f"{PREFIX}{name}.lora_A.weight" in known for name in first]
    ranks = tuple(rank if one else 0 for rank, one in zip(form.ranks, there, strict=True))
    return replace(form, ranks=ranks) if any(there) else form


def _found(family: Family, stem: str, tensors: Stored) -> Form | None:
    if f"{stem}.{A}" in tensors:
        return Form((_rank(tensors, f"{stem}.{A}"),) * len(family.rule.hf), False)
    stems = [f"{stem}.adapter_{part}" for part in (PARTS[module_of(family)] if splits(family) else ())]
    ranks = tuple(_rank(tensors, f"{each}.{A}") if f"{each}.{A}" in tensors else 0 for each in stems)
    grids = [tensors[f"{each}.{B}"][2] for each in stems if f"{each}.{B}" in tensors]
    return Form(ranks, True, _halves(grids)) if any(ranks) else None


def _rank(tensors: Stored, key: str) -> int:
    shape = tensors[key][1]
    return shape[-2] if len(shape) > 1 else 0


def _halves(grids: list[Any]) -> int:
    """The TP size at which B of gate or up was stored: it has two chunks for each rank."""
    return max(1, max((len({box[-2] for box, _ in places}) for places in grids), default=2) // 2)


def _wrapped(base: Model, adapted: Adapted) -> Adapted:
    """With PEFT's names of stacked experts: a module's parameters are wrapped in turn, the first name outermost."""
    owners: dict[tuple[str, int], list[tuple[str, int]]] = {}
    for number, forms in adapted.items():
        name = base.families[number].rule.hf[0].name
        for layer in forms if not name.endswith(".weight") else ():
            owners.setdefault((name.rpartition(".")[0], layer), []).append((name, number))
    for (_, layer), wrapped in owners.items():
        for depth, (_, number) in enumerate(sorted(wrapped)):
            adapted[number][layer] = replace(adapted[number][layer], suffix=".base_layer" * depth)
    return adapted
