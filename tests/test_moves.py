"""Copies move exactly the elements that a naive map of names says, for any cut of either side."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import (
    Case,
    Element,
    Memory,
    box_places,
    cases,
    cell_places,
    copy_pairs,
    expected_pairs,
    flat,
    layouts,
    model_of,
    places,
    ranges_within,
    read,
    run_pairs,
    shape_of,
    sizes_of,
    spec_of,
    tilings,
    write,
)

from transcoder.atlas import Atlas
from transcoder.engine import gather, scatter
from transcoder.fillers import fill
from transcoder.layout import parse
from transcoder.moves import Copy, boxes_of_range, clip, copy_of, fuse, runs, strides
from transcoder.planner import Model
from transcoder.spec import DTYPES, Box

PROPERTY = settings(deadline=None, max_examples=120, derandomize=True)
INT32 = DTYPES["int32"]
SHAPES = st.lists(st.integers(1, 5), min_size=1, max_size=4).map(tuple)
Array = np.ndarray[Any, Any]


def drawn_range(data: st.DataObject, count: int) -> tuple[int, int]:
    """A flat range below `count`."""
    return data.draw(ranges_within(count))


@PROPERTY
@given(SHAPES, st.data())
def test_boxes_of_a_range_tile_it_in_ascending_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    start, stop = drawn_range(data, prod(shape))
    boxes = boxes_of_range(shape, start, stop)
    assert [flat(place, shape) for box in boxes for place in box_places(box)] == list(range(start, stop))


@PROPERTY
@given(SHAPES)
def test_strides_are_those_of_numpy(shape: tuple[int, ...]) -> None:
    assert tuple(strides(shape)) == np.empty(shape, np.int8).strides


@PROPERTY
@given(layouts(), sizes_of(), st.data())
def test_clip_finds_the_elements_inside_a_box_once(text: str, sizes: dict[str, int], data: st.DataObject) -> None:
    shape = shape_of(text, sizes)
    box = tuple(drawn_range(data, extent) for extent in shape)
    inside = set(box_places(box))
    for cell in parse(text).cells(sizes):
        parts = clip(cell, box)
        assert all(first < last for ranges in parts for first, last in ranges.values())
        found = [element for ranges in parts for element in elements_of(ranges)]
        assert sorted(found, key=sorted) == sorted((e for p, e in cell_places(cell) if p in inside), key=sorted)


@PROPERTY
@given(layouts(), sizes_of())
def test_a_box_around_a_whole_cell_takes_it_in_one_part(text: str, sizes: dict[str, int]) -> None:
    whole = tuple((0, extent) for extent in shape_of(text, sizes))
    for cell in parse(text).cells(sizes):
        assert clip(cell, whole) == [{axis: (0, size) for axis, size in cell.sizes.items()}]


@PROPERTY
@given(layouts(), sizes_of(), st.data())
def test_clip_stays_inside_given_ranges(text: str, sizes: dict[str, int], data: st.DataObject) -> None:
    whole = tuple((0, extent) for extent in shape_of(text, sizes))
    for cell in parse(text).cells(sizes):
        ranges = {axis: drawn_range(data, size) for axis, size in cell.sizes.items()}
        found = [element for part in clip(cell, whole, ranges) for element in elements_of(part)]
        assert sorted(found, key=sorted) == sorted(elements_of(ranges), key=sorted)


def elements_of(ranges: dict[str, tuple[int, int]]) -> list[frozenset[tuple[str, int]]]:
    """Every element of a box of axis ranges."""
    return [frozenset(zip(ranges, at, strict=True)) for at in product(*(range(*r) for r in ranges.values()))]


@pytest.mark.parametrize("box", [(), ((0, 1),), ((0, 1), (0, 1), (0, 1))])
def test_a_box_of_another_rank_is_refused(box: Box) -> None:
    with pytest.raises(ValueError):
        clip(parse("v h").cells({"v": 3, "h": 2})[0], box)


def copies_between(case: Case, part: int, box: Box, start: int, stop: int) -> list[Copy]:
    """The copies between a chunk and a flat range of one Hugging Face tensor, put together from the primitives."""
    shape = shape_of(case.hf[part], case.sizes)
    cells = {cell.key: cell for cell in parse(case.mcore).cells(case.sizes)}
    found = []
    for hf in parse(case.hf[part]).cells(case.sizes):
        mcore = cells[hf.key]
        for band in boxes_of_range(shape, start, stop):
            inner = [ranges for outer in clip(hf, band) for ranges in clip(mcore, box, outer)]
            found += [copy_of(mcore, box, hf, shape, start, ranges) for ranges in inner]
    return found


@PROPERTY
@given(cases(), st.data())
def test_copies_hold_every_shared_element_once(case: Case, data: st.DataObject) -> None:
    mcore = places(case.mcore, case.sizes)
    boxes = data.draw(tilings(shape_of(case.mcore, case.sizes)))
    for part, text in enumerate(case.hf):
        hf = places(text, case.sizes)
        start, stop = drawn_range(data, len(hf))
        for box in boxes:
            pairs = [pair for copy in copies_between(case, part, box, start, stop) for pair in copy_pairs(copy)]
            assert sorted(pairs) == expected_pairs(mcore, box, hf, start, stop)


@PROPERTY
@given(cases(), st.data())
def test_runs_and_counts_of_a_copy_agree_with_its_elements(case: Case, data: st.DataObject) -> None:
    box = data.draw(st.sampled_from(data.draw(tilings(shape_of(case.mcore, case.sizes)))))
    start, stop = drawn_range(data, prod(shape_of(case.hf[0], case.sizes)))
    for copy in copies_between(case, 0, box, start, stop):
        pairs = copy_pairs(copy)
        assert copy.count == len(pairs)
        assert sorted(pair for run in runs(copy) for pair in run_pairs(run)) == sorted(pairs)


@PROPERTY
@given(cases(), st.data())
def test_the_inverse_swaps_the_sides(case: Case, data: st.DataObject) -> None:
    start, stop = drawn_range(data, prod(shape_of(case.hf[0], case.sizes)))
    whole = tuple((0, extent) for extent in shape_of(case.mcore, case.sizes))
    for copy in copies_between(case, 0, whole, start, stop):
        back = copy.inverse()
        assert sorted(copy_pairs(back)) == sorted((hf, chunk) for chunk, hf in copy_pairs(copy))
        assert sorted(pair for run in runs(back) for pair in run_pairs(run)) == sorted(copy_pairs(back))
        assert back.inverse() == copy


steps = st.integers(1, 60)
AXIS = st.tuples(st.integers(0, 3), st.integers(1, 4), steps, steps)


@PROPERTY
@given(st.lists(AXIS, min_size=0, max_size=4), st.integers(0, 9), st.integers(0, 9))
def test_fusing_axes_keeps_the_pairs(axes: list[tuple[int, int, int, int]], chunk: int, hf: int) -> None:
    ranges = {f"a{n}": (low, low + count) for n, (low, count, _, _) in enumerate(axes)}
    copy = fuse(
        ranges,
        chunk,
        {f"a{n}": step for n, (_, _, step, _) in enumerate(axes)},
        hf,
        {f"a{n}": step for n, (_, _, _, step) in enumerate(axes)},
    )
    plain = Copy(tuple(a[1] for a in axes), chunk, tuple(a[2] for a in axes), hf, tuple(a[3] for a in axes))
    assert sorted(copy_pairs(copy)) == sorted(copy_pairs(plain))
    assert sorted(pair for run in runs(copy) for pair in run_pairs(run)) == sorted(copy_pairs(plain))


@PROPERTY
@given(SHAPES.filter(lambda shape: prod(shape) > 1))
def test_axes_that_travel_together_become_one(shape: tuple[int, ...]) -> None:
    ranges = {str(n): (0, extent) for n, extent in enumerate(shape)}
    step = {str(n): stride for n, stride in enumerate(strides(shape))}
    assert fuse(ranges, 3, step, 5, step) == Copy((prod(shape),), 3, (1,), 5, (1,))


@dataclass(frozen=True)
class Stored:
    """A model whose every layer is one case: what lies where, by name, on both sides."""

    model: Model
    atlas: Atlas
    mcore: dict[str, dict[tuple[int, ...], Element]]
    hf: dict[str, dict[tuple[int, ...], Element]]


@st.composite
def stored_cases(draw: st.DrawFn) -> Stored:
    """A case in one to three layers, stacked or not, padded or not, in arbitrary chunks."""
    case, dialect = draw(cases()), draw(st.sampled_from(["stacked", "per-layer"]))
    first, *rest = map(write, read(case.mcore))
    mcore = draw(
        st.sampled_from([case.mcore, " ".join([f"[{first} pad]", *rest]), " ".join([f"[pad {first}]", *rest])])
    )
    sizes = case.sizes | {"pad": draw(st.integers(0, 2)), "l": draw(st.integers(1, 3))}
    sides = tuple(f"model.layers.{{l}}.t{n} {text}" for n, text in enumerate(case.hf))
    model = model_of(f"decoder.layers.{{l}}.weight {mcore}", sides, sizes, dialect)
    hf = {f"model.layers.{i}.t{n}": layer(t, sizes, i) for i in range(sizes["l"]) for n, t in enumerate(case.hf)}
    keys = {f"decoder.layers.{i}.weight": layer(mcore, sizes, i) for i in range(sizes["l"])}
    if dialect == "stacked":
        keys = {"decoder.layers.weight": places(f"l {mcore}", sizes)}
    catalog = {key: spec_of(key, shape(table), draw(tilings(shape(table)))) for key, table in keys.items()}
    return Stored(model, Atlas(catalog), keys, hf)


def layer(text: str, sizes: dict[str, int], index: int) -> dict[tuple[int, ...], Element]:
    """The elements of one layer's tensor."""
    return {place: element | {("l", index)} for place, element in places(text, sizes).items()}


def shape(table: dict[tuple[int, ...], Element]) -> tuple[int, ...]:
    """The extents of a tensor that holds at least one element."""
    return tuple(top + 1 for top in max(table))


def numbered(stored: Stored) -> dict[str, Array]:
    """Flat values for every Hugging Face tensor, all different and none zero."""
    ends = np.cumsum([len(table) for table in stored.hf.values()])
    parts = np.split(np.arange(1, ends[-1] + 1, dtype=np.uint32), ends[:-1])
    return dict(zip(stored.hf, parts, strict=True))


def scattered(stored: Stored, edges: set[int]) -> Memory:
    """Every tensor sent to the chunks in bands that end at `edges`, and the filler written."""
    memory = Memory()
    for name, values in numbered(stored).items():
        ends = sorted({0, len(values)} | {edge for edge in edges if edge < len(values)})
        for start, stop in itertools.pairwise(ends):
            scatter(stored.atlas, stored.model.hf[name], start, values[start:stop], memory.sink)
    for _, filler in stored.model.fillers():
        fill(stored.atlas, filler, INT32, memory.sink)
    return memory


EDGES = st.sets(st.integers(1, 60), max_size=6)


@PROPERTY
@given(stored_cases(), EDGES)
def test_scattering_any_bands_fills_every_chunk_with_its_elements(stored: Stored, edges: set[int]) -> None:
    memory, values = scattered(stored, edges), numbered(stored)
    value_of = {
        e: int(v) for name, table in stored.hf.items() for e, v in zip(table.values(), values[name], strict=True)
    }
    chunks = [(key, chunk) for key, spec in stored.atlas.catalog.items() for chunk in spec.chunks]
    assert set(memory.data) == {(key, chunk.box) for key, chunk in chunks}
    for key, chunk in chunks:
        expected = [value_of.get(stored.mcore[key][place], 0) for place in box_places(chunk.box)]
        assert memory.data[key, chunk.box].view(np.uint32).tolist() == expected
        assert (memory.writes[key, chunk.box] == 1).all()


@PROPERTY
@given(stored_cases(), st.data())
def test_gathering_any_range_gives_back_what_was_scattered(stored: Stored, data: st.DataObject) -> None:
    memory = scattered(stored, set())
    for name, values in numbered(stored).items():
        start, stop = drawn_range(data, len(values))
        found = gather(stored.atlas, stored.model.hf[name], start, stop, INT32, memory.fetch)
        assert found.tolist() == values[start:stop].tolist()


@PROPERTY
@given(stored_cases())
def test_fillers_are_the_elements_that_no_tensor_supplies(stored: Stored) -> None:
    supplied = {element for table in stored.hf.values() for element in table.values()}
    found = []
    for _, filler in stored.model.fillers():
        assert filler.cell.filler == "pad"
        for chunk, copy in stored.atlas.fillers(filler):
            inside = list(box_places(chunk.box))
            found += [stored.mcore[filler.key][inside[element]] for element, _ in copy_pairs(copy)]
    expected = [element for table in stored.mcore.values() for element in table.values() if element not in supplied]
    assert sorted(found, key=sorted) == sorted(expected, key=sorted)
