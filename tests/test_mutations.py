"""Mutations over every architecture: a damaged recipe or source is refused, or gives other Megatron bytes.

What the bytes must be is spelled out a second time in `naive.Naive`, which knows no recipe.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hf_models import Entry, Files, read_files, write_files
from naive import expected
from zoo import FP8_KINDS, KINDS, MXFP4_KINDS, Config, Tensors, made, read_config

from transcoder.api import plan_hf2mcore
from transcoder.errors import InputError, TranscoderError
from transcoder.importing import ImportPlan
from transcoder.layout import parse
from transcoder.movers import stream_import
from transcoder.notation import Axis, LayoutError, Node, leaves
from transcoder.progress import Tally
from transcoder.recipe import Recipe, Rule, Side
from transcoder.recipes import recipe_for
from transcoder.sizing import active_rules
from transcoder.spec import Chunk

Mutant = tuple[str, Recipe]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def held(plan: ImportPlan) -> Tensors:
    """The Megatron tensors of a plan, put together in memory."""
    catalog = plan.placement.catalog
    found = {key: np.zeros((*spec.shape, spec.dtype.size), np.uint8) for key, spec in catalog.items()}
    parts = {(key, chunk.box): bytearray(chunk.nbytes) for key, spec in catalog.items() for chunk in spec.chunks}

    def sink(key: str, chunk: Chunk, start: int, data: memoryview) -> None:
        parts[key, chunk.box][start : start + data.nbytes] = data.cast("B")

    stream_import(plan, sink, 1, Tally(plan.model, 1))
    for (key, box), data in parts.items():
        place = found[key][tuple(slice(*ends) for ends in box)]
        place[:] = np.frombuffer(data, np.uint8).reshape(place.shape)
    return {key: torch.from_numpy(raw).view(DTYPES[catalog[key].dtype.name]).squeeze(-1) for key, raw in found.items()}


def fits(found: Tensors, kind: str) -> bool:
    """Whether these are the Megatron tensors that the kind must give; padding rows are zeros."""
    wanted = expected(kind)
    return found.keys() == wanted.keys() and all(_same(key, found[key], tensor) for key, tensor in wanted.items())


def _same(key: str, stored: torch.Tensor, wanted: torch.Tensor) -> bool:
    rows = (
        -(-len(wanted) // 128) * 128 if key.endswith(("word_embeddings.weight", "output_layer.weight")) else len(wanted)
    )
    same = stored.shape == (rows, *wanted.shape[1:]) and torch.equal(stored[: len(wanted)].float(), wanted.float())
    return same and not stored[len(wanted) :].any()


def usual_dtypes(kind: str) -> dict[str, str]:
    """The stored dtype of each Megatron tensor by the undamaged recipe."""
    return {
        key: spec.dtype.name for key, spec in plan_hf2mcore(made(kind), layout="per-layer").placement.catalog.items()
    }


@contextmanager
def recipe(changed: Recipe) -> Iterator[None]:
    """The converter with one recipe replaced."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcoder.recipes.registry", lambda: dict.fromkeys(changed.hf, changed))
        yield


def survives(kind: str, mutant: Recipe, dtypes: Mapping[str, str]) -> bool:
    """Whether a damaged recipe goes unnoticed."""
    with recipe(mutant):
        try:
            found = held(plan := plan_hf2mcore(made(kind), layout="per-layer"))
        except (TranscoderError, LayoutError):
            return False
    stored = {key: spec.dtype.name for key, spec in plan.placement.catalog.items()}
    return stored == dtypes and fits(found, kind)


def active(kind: str) -> tuple[Recipe, list[int], Mapping[str, int]]:
    """The recipe of a kind, the places of its rules that apply to some layer, and the axis sizes."""
    model = plan_hf2mcore(made(kind)).model
    rows = enumerate(active_rules(model.recipe, model.values, model.sizes))
    return model.recipe, [place for place, (_, layers) in rows if layers], model.sizes


def with_rules(whole: Recipe, changes: Mapping[int, Rule | None]) -> Recipe:
    """The recipe with some rules replaced or dropped."""
    rules = [changes.get(place, each) for place, each in enumerate(whole.rules)]
    return replace(whole, rules=tuple(each for each in rules if each is not None))


def with_side(rule: Rule, at: int, side: Side, field: str = "hf") -> Rule:
    """The rule with another side."""
    sides: tuple[Side, ...] = getattr(rule, field)
    changed: dict[str, Any] = {field: (*sides[:at], side, *sides[at + 1 :])}
    return replace(rule, **changed)


def dropped(whole: Recipe, places: list[int], _: Mapping[str, int]) -> Iterator[Mutant]:
    for place in places:
        yield f"without {whole.rules[place].label}", with_rules(whole, {place: None})


def guards_negated(whole: Recipe, places: list[int], _: Mapping[str, int]) -> Iterator[Mutant]:
    for place in places:
        rule = whole.rules[place]
        if rule.only:
            changed = replace(rule, only=f"not ({rule.only})")
            yield f"{changed.only}: {rule.label}", with_rules(whole, {place: changed})


def other_dtypes(whole: Recipe, places: list[int], _: Mapping[str, int]) -> Iterator[Mutant]:
    for place in places:
        rule = whole.rules[place]
        if not rule.alias:
            other = "" if rule.dtype else "float32"
            yield f"dtype {other!r}: {rule.label}", with_rules(whole, {place: replace(rule, dtype=other)})


def names_exchanged(whole: Recipe, places: list[int], sizes: Mapping[str, int]) -> Iterator[Mutant]:
    """Hugging Face tensors of one shape and as many copies exchanged, within a rule and between rules."""
    sizes = {**sizes, **{f"zero_{axis}": size for axis, size in sizes.items()}}
    groups: dict[Any, list[tuple[int, int]]] = {}
    for place in places:
        rule = whole.rules[place]
        for at, side in enumerate(rule.hf):
            groups.setdefault((side.layout.shape(sizes), side.name_axes, rule.alias), []).append((place, at))
    for rows in groups.values():
        for (one, i), (two, j) in [*pairwise(rows), (rows[0], rows[-1])]:
            a, b = whole.rules[one].hf[i], whole.rules[two].hf[j]
            if a.name == b.name:  # one tensor in some layers, and that in others
                continue
            first = with_side(whole.rules[one], i, Side(b.name, a.layout))
            second = with_side(first if one == two else whole.rules[two], j, Side(a.name, b.layout))
            yield f"{a.name} for {b.name}", with_rules(whole, {one: first, two: second})


def transposed(whole: Recipe, places: list[int], sizes: Mapping[str, int]) -> Iterator[Mutant]:
    """The last two dimensions of a Hugging Face layout exchanged."""
    for place, at, side in _sides(whole, places, "hf"):
        dims = [str(node) for node in side.layout.dims]
        if len(dims) > 1 and dims[-1] != dims[-2] and max(side.layout.shape(sizes)[-2:]) > 1:
            other = Side(side.name, parse(" ".join([*dims[:-2], dims[-1], dims[-2]])))
            yield f"{side.name} transposed", with_rules(whole, {place: with_side(whole.rules[place], at, other)})


def orders_reversed(whole: Recipe, places: list[int], sizes: Mapping[str, int]) -> Iterator[Mutant]:
    """The parts of a product or a sum in the opposite order, on one side."""
    for field in ("hf", "mcore"):
        for place, at, side in _sides(whole, places, field):
            for number, dim in enumerate(side.layout.dims):
                for text in _reversals(dim, sizes):
                    dims = [str(node) for node in side.layout.dims]
                    try:
                        other = Side(side.name, parse(" ".join([*dims[:number], text, *dims[number + 1 :]])))
                    except LayoutError:  # an order that the notation itself refuses
                        continue
                    changed = with_side(whole.rules[place], at, other, field)
                    yield f"{side.name} {other.layout.text}", with_rules(whole, {place: changed})


def _reversals(node: Node, sizes: Mapping[str, int]) -> Iterator[str]:
    """The text of a dimension with one of its brackets reversed, where that means something else."""
    if isinstance(node, Axis):
        return
    mesh, close = f"/{node.mesh}" if node.mesh else "", {"(": ")", "[": "]"}[node.kind]
    wide = [item for item in node.items if any(sizes.get(axis.name, 0) > 1 for axis in leaves(item))]
    if len(wide) > 1 or (node.kind == "[" and wide):
        yield f"{node.kind}{' '.join(map(str, reversed(node.items)))}{close}{mesh}"
    for at, item in enumerate(node.items):
        for text in _reversals(item, sizes):
            items = [*map(str, node.items[:at]), text, *map(str, node.items[at + 1 :])]
            yield f"{node.kind}{' '.join(items)}{close}{mesh}"


def _sides(whole: Recipe, places: list[int], field: str) -> Iterator[tuple[int, int, Side]]:
    for place in places:
        if not whole.rules[place].alias:
            yield from ((place, at, side) for at, side in enumerate(getattr(whole.rules[place], field)))


def axes_off_by_one(whole: Recipe, places: list[int], _: Mapping[str, int]) -> Iterator[Mutant]:
    for axis in sorted({axis for place in places for axis in whole.rules[place].axes} & whole.axes.keys()):
        yield f"{axis} + 1", replace(whole, axes={**whole.axes, axis: f"({whole.axes[axis]}) + 1"})


MUTATIONS: tuple[Callable[[Recipe, list[int], Mapping[str, int]], Iterator[Mutant]], ...] = (
    dropped, guards_negated, other_dtypes, names_exchanged, transposed, orders_reversed, axes_off_by_one,
)  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_the_undamaged_recipe_passes(kind: str) -> None:
    assert survives(kind, recipe_for(read_config(made(kind))["architectures"][0]), usual_dtypes(kind))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.__name__)
def test_a_damaged_recipe_is_refused_or_gives_other_bytes(kind: str, mutation: Any) -> None:
    dtypes, mutants = usual_dtypes(kind), list(mutation(*active(kind)))
    assert mutants or mutation is guards_negated
    assert [name for name, mutant in mutants if survives(kind, mutant, dtypes)] == []


def examples(files: Files) -> dict[str, tuple[str, int]]:
    """One tensor of every name pattern, the last: its name, its file and its place there."""
    found = {}
    for file, entries in files.items():
        for at, entry in enumerate(entries):
            found[re.sub(r"\d+", "N", entry.name)] = (entry.name, (file, at))
    return dict(found.values())


def without(entry: Entry) -> list[Entry]:
    return []


def beside_another(entry: Entry) -> list[Entry]:
    return [entry, replace(entry, name=f"{entry.name}_other")]


def one_row_more(entry: Entry) -> list[Entry]:
    return [entry.reshaped((entry.shape[0] + 1, *entry.shape[1:]))]


def one_axis_more(entry: Entry) -> list[Entry]:
    return [entry.reshaped((1, *entry.shape))]


def in_float16(entry: Entry) -> list[Entry]:
    return [entry.retyped("F16")]


DAMAGES = (without, beside_another, one_row_more, one_axis_more, in_float16)


@pytest.mark.parametrize(
    ("kind", "damage"), [*product(KINDS, DAMAGES), *product([*FP8_KINDS, *MXFP4_KINDS], [without])]
)
def test_a_damaged_tensor_is_refused_by_name(kind: str, damage: Callable[[Entry], list[Entry]], tmp_path: Path) -> None:
    source = shutil.copytree(made(kind), tmp_path / "hf")
    files, unnoticed = read_files(source), []
    for name, (file, at) in examples(files).items():
        entries = files[file]
        write_files(source, {**files, file: [*entries[:at], *damage(entries[at]), *entries[at + 1 :]]})
        try:
            plan_hf2mcore(source)
            unnoticed.append(name)
        except InputError as error:
            if name not in str(error):
                unnoticed.append(f"{name}: {error}")
    assert unnoticed == []


def numbers_in(config: Config, prefix: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Paths of all integers of a config."""
    for name, value in config.items():
        if isinstance(value, dict):
            yield from numbers_in(value, (*prefix, name))
        elif type(value) is int:
            yield (*prefix, name)


def off(config: Config, path: tuple[str, ...], by: int) -> Config:
    """The config with one integer changed."""
    new = off(config[path[0]], path[1:], by) if len(path) > 1 else config[path[0]] + by
    return {**config, path[0]: new}


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_of_the_config_that_is_off_by_one_never_gives_other_weights(kind: str, tmp_path: Path) -> None:
    source, config, refused = shutil.copytree(made(kind), tmp_path / "hf"), read_config(made(kind)), set()
    for path in numbers_in(config):
        for by in (-1, 1):
            (source / "config.json").write_text(json.dumps(off(config, path, by)))
            try:
                found = held(plan_hf2mcore(source, layout="per-layer"))
                assert fits(found, kind), f"{path} {by:+} gave other weights"
            except InputError:
                refused.add(path[-1])
    assert refused >= {"hidden_size", "vocab_size"} | (
        {"num_hidden_layers"} & {path[-1] for path in numbers_in(config)}
    )
