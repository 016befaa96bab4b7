"""Layouts moved chunk by chunk agree with einops on products, and with NumPy on the sums that real models have."""

from __future__ import annotations

import re
from itertools import product
from math import prod
from typing import Any

import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Memory, Tree, dims_of, model_of, shape_of, sizes_of, spec_of, spelled, tilings, write

from transcoder.atlas import Atlas
from transcoder.engine import scatter
from transcoder.fillers import fill
from transcoder.layout import parse
from transcoder.moves import runs
from transcoder.spec import DTYPES, Box, box_shape

pytestmark = pytest.mark.usefixtures("loops")
PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)
INT32 = DTYPES["int32"]
Array = np.ndarray[Any, Any]
QKV = "(g [(q d) k v])/tp h"


def chunks_of(mcore: str, hf: dict[str, Array], sizes: dict[str, int], boxes: tuple[Box, ...]) -> list[Array]:
    """What our copies put into each chunk of the tensor that `mcore` lays out; `hf` is arrays by layout."""
    model = model_of(f"m {mcore}", tuple(f"t{n} {text}" for n, text in enumerate(hf)), sizes)
    extents = parse(mcore).shape(sizes)
    atlas, memory = Atlas({"m": spec_of("m", extents, boxes or (tuple((0, size) for size in extents),))}), Memory()
    for tensor, array in zip(model.hf.values(), hf.values(), strict=True):
        assert tensor.shape == array.shape
        scatter(atlas, tensor, 0, array.reshape(-1), memory.sink)
    for _, filler in model.fillers():
        fill(atlas, filler, INT32, memory.sink)
    found = [(memory.data["m", chunk.box], chunk.box) for chunk in atlas.catalog["m"].chunks]
    return [data.view(np.uint32).reshape(box_shape(box)) for data, box in found]


def cut_boxes(mcore: str, sizes: dict[str, int], tp: int) -> tuple[Box, ...]:
    """The grid of chunks that a mesh cuts."""
    dims = parse(mcore).cuts(sizes, {"tp": tp})
    return tuple(tuple((cut.start, cut.stop) for cut in at) for at in product(*dims))


def arange(*shape: int, first: int = 1) -> Array:
    """Values from `first`, all different."""
    return np.arange(first, first + prod(shape), dtype=np.uint32).reshape(shape)


PRODUCTS = st.sets(st.sampled_from("abcd"), min_size=1).flatmap(
    lambda axes: st.tuples(spelled([frozenset(axes)]), spelled([frozenset(axes)]))
)


def einops_side(tree: Tree) -> str:
    """A product as einops writes it: no brackets inside brackets."""
    return " ".join(re.sub(r"(?<=.)[()](?=.)", "", write(dim)) for dim in dims_of(tree))


@PROPERTY
@given(PRODUCTS, sizes_of(4), st.data())
def test_products_move_as_einops_rearranges(
    pair: tuple[Tree, Tree], sizes: dict[str, int], data: st.DataObject
) -> None:
    mcore, hf = (" ".join(map(write, dims_of(side))) for side in pair)
    source = arange(*shape_of(hf, sizes))
    used = {axis: size for axis, size in sizes.items() if axis in hf}
    expected = rearrange(source, f"{einops_side(pair[1])} -> {einops_side(pair[0])}", **used)
    boxes = data.draw(tilings(expected.shape))
    for found, box in zip(chunks_of(mcore, {hf: source}, sizes, boxes), boxes, strict=True):
        np.testing.assert_array_equal(found, expected[tuple(slice(*edge) for edge in box)])


COUNT = st.integers(1, 3)


@PROPERTY
@given(COUNT, COUNT, COUNT, COUNT, st.integers(1, 8))
def test_query_groups_are_interleaved(g: int, q: int, d: int, h: int, tp: int) -> None:
    sizes = {"g": g, "q": q, "d": d, "k": d, "v": d, "h": h}
    query, key, value = arange(g * q * d, h), arange(g * d, h, first=1000), arange(g * d, h, first=2000)
    groups = [[query[i * q * d :][: q * d], key[i * d :][:d], value[i * d :][:d]] for i in range(g)]
    fused = np.concatenate([rows for group in groups for rows in group])
    tp = tp if len(fused) % tp == 0 else 1
    found = chunks_of(QKV, {"(g q d) h": query, "(g k) h": key, "(g v) h": value}, sizes, cut_boxes(QKV, sizes, tp))
    np.testing.assert_array_equal(np.concatenate(found), fused)
    assert [len(part) for part in found] == [len(fused) // tp] * tp


@PROPERTY
@given(COUNT, COUNT, COUNT)
def test_every_rank_has_its_part_of_gate_and_of_up(rows: int, h: int, tp: int) -> None:
    sizes = {"gate": rows * tp, "up": rows * tp, "h": h}
    gate, up = arange(rows * tp, h), arange(rows * tp, h, first=1000)
    text = "[gate/tp up/tp] h"
    found = chunks_of(text, {"gate h": gate, "up h": up}, sizes, cut_boxes(text, sizes, tp))
    for rank in range(tp):
        local = np.concatenate([found[rank], found[tp + rank]])
        mine = slice(rank * rows, (rank + 1) * rows)
        np.testing.assert_array_equal(local, np.concatenate([gate[mine], up[mine]]))


@PROPERTY
@given(st.integers(1, 9), COUNT, st.integers(1, 4))
def test_the_vocabulary_is_padded_with_zero_rows_at_its_end(v: int, h: int, tp: int) -> None:
    pad = -v % (2 * tp)
    sizes, table = {"v": v, "pad": pad, "h": h}, arange(v, h)
    found = chunks_of("[v pad]/tp h", {"v h": table}, sizes, cut_boxes("[v pad]/tp h", sizes, tp))
    np.testing.assert_array_equal(np.concatenate(found), np.pad(table, ((0, pad), (0, 0))))
    assert len(found) == tp


@PROPERTY
@given(COUNT, COUNT, st.integers(1, 4))
def test_row_parallel_columns_are_cut(h: int, columns: int, tp: int) -> None:
    sizes, weight = {"h": h, "f": columns * tp}, arange(h, columns * tp)
    found = chunks_of("h f/tp", {"h f": weight}, sizes, cut_boxes("h f/tp", sizes, tp))
    for part, expected in zip(found, np.split(weight, tp, axis=1), strict=True):
        np.testing.assert_array_equal(part, expected)


@PROPERTY
@given(COUNT, COUNT, COUNT)
def test_interleaved_and_transposed_experts(e: int, f: int, h: int) -> None:
    sizes, weight = {"e": e, "f": f, "h": h, "gate": 1, "up": 1}, arange(e, h, 2 * f)
    found = chunks_of("e ([gate up] f) h", {"e h (f [gate up])": weight}, sizes, ())[0]
    gates, ups = weight[:, :, 0::2].transpose(0, 2, 1), weight[:, :, 1::2].transpose(0, 2, 1)
    np.testing.assert_array_equal(found, np.concatenate([gates, ups], axis=1))


@PROPERTY
@given(COUNT, COUNT, COUNT, COUNT, COUNT)
def test_parts_of_every_rank_become_whole_parts(t: int, z: int, x: int, dt: int, h: int) -> None:
    sizes = {"t": t, "z": z, "x": x, "dt": dt, "h": h}
    blocks = [arange(t * size, h, first=1000 * n) for n, size in enumerate((z, x, dt), 1)]
    found = chunks_of("(t [z x dt]) h", {"[(t z) (t x) (t dt)] h": np.concatenate(blocks)}, sizes, ())[0]
    expected = np.concatenate([np.split(block, t)[rank] for rank in range(t) for block in blocks])
    np.testing.assert_array_equal(found, expected)


def qkv_runs(sizes: dict[str, int], rank: int, tp: int) -> dict[str, list[tuple[int, int, int]]]:
    """Per part of one rank's chunk: (row in the chunk, rows, row in the Hugging Face tensor)."""
    model = model_of(f"m {QKV}", ("q (g q d) h", "k (g k) h", "v (g v) h"), sizes)
    box = cut_boxes(QKV, sizes, tp)[rank]
    atlas, h = Atlas({"m": spec_of("m", parse(QKV).shape(sizes), (box,))}), sizes["h"]
    found: dict[str, list[tuple[int, int, int]]] = {}
    for name, tensor in model.hf.items():
        copies = [copy for _, _, copy in atlas.pieces(tensor, 0, prod(tensor.shape))]
        found[name] = sorted((run.chunk // h, run.count // h, run.hf // h) for copy in copies for run in runs(copy))
    return found


def test_a_rank_that_holds_one_group_takes_one_run_of_each_part() -> None:
    sizes = {"g": 8, "q": 8, "d": 128, "k": 128, "v": 128, "h": 8192}
    expected = {"q": [(0, 1024, 5120)], "k": [(1024, 128, 640)], "v": [(1152, 128, 640)]}
    assert qkv_runs(sizes, rank=5, tp=8) == expected


def test_fewer_groups_than_ranks_cut_inside_a_head() -> None:
    sizes = {"g": 2, "q": 16, "d": 128, "k": 128, "v": 128, "h": 4}
    assert qkv_runs(sizes, rank=3, tp=8) == {
        "q": [(0, 64, 1728), (64, 256, 1792)],
        "k": [(320, 128, 0)],
        "v": [(448, 128, 0)],
    }
    assert all(qkv_runs(sizes, rank, tp=8)["k"] == [] for rank in (0, 1, 2))


def test_tensors_of_one_rule_and_one_size_are_kept_apart() -> None:
    sizes = {"a": 1, "b": 1, "c": 2}
    found = chunks_of("[a b c]", {"[b a]": arange(2), "c": arange(2, first=10)}, sizes, ())[0]
    assert found.tolist() == [2, 1, 10, 11]
