"""Layouts mean what a naive walk over their elements says, and wrong texts are refused by name."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import AXES, cell_places, keys, layouts, places, read, shape_of, sizes_of, trees, write

from transcoder.layout import Cell, Cut, LayoutError, parse

PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)
MESHES = st.sampled_from(["tp", "etp"])


@pytest.mark.parametrize(
    "text",
    [
        *("(g q", "[gate up", "(g [q k) v", "h (f", "("),
        *("h)", "]", "(g q)) h", "(g q]", "[gate up)"),
        *("()", "[]", "h ()", "(g [] d)", "( )"),
        *("h/pp", "(g q)/dp h", "h/", "h/tpx", "[gate/tensor up]", "h/tp/ep", "/tp", "/tp h"),
        *("h-q", "h, f", "H", "1h", "h*2", "h:4", "{l} h", "gate+up", "h .", "é"),
    ],
)
def test_a_text_that_is_not_a_layout_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(text)):
        parse(text)


@pytest.mark.parametrize("text", ["", " ", "\t"])
def test_a_text_without_axes_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="no axes"):
        parse(text)


@pytest.mark.parametrize("text", ["(d g/tp) h", "(g/tp d)", "(e/each f)", "([a/tp b])", "[a/tp b]/tp", "[(a b/tp) c]"])
def test_a_mesh_inside_a_product_or_another_cut_is_refused(text: str) -> None:
    with pytest.raises(LayoutError, match="mark the whole"):
        parse(text)


def test_an_axis_without_a_size_is_named() -> None:
    with pytest.raises(LayoutError, match="axis h has no size"):
        parse("g h").shape({"g": 2})


@pytest.mark.parametrize("text", ["h h", "(g g)", "h (g h)", "g [(g d) k]", "([g k] (q g))", "(a [(b c) (a d)])"])
def test_an_axis_that_recurs_in_a_product_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(text)):
        parse(text)


@pytest.mark.parametrize("text", ["[a a]", "[(a b) (b a)] c", "[a b] [a b]", "(c [a [b a]])", "[(a [b c]) (b a)]"])
def test_two_cells_with_the_same_axes_are_refused(text: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(text)):
        parse(text).cells(dict.fromkeys("abc", 2))


@PROPERTY
@given(trees(), sizes_of())
def test_cells_are_refused_exactly_when_two_have_the_same_axes(tree: object, sizes: dict[str, int]) -> None:
    found = keys(tree)
    if len(set(found)) < len(found):
        with pytest.raises(LayoutError):
            parse(write(tree)).cells(sizes)
    else:
        assert [cell.key for cell in parse(write(tree)).cells(sizes)] == found


@PROPERTY
@given(layouts(), sizes_of())
def test_shape_counts_the_elements_along_every_dimension(text: str, sizes: dict[str, int]) -> None:
    assert parse(text).shape(sizes) == shape_of(text, sizes)


@PROPERTY
@given(layouts(), sizes_of())
def test_cells_tile_the_tensor_with_the_right_elements(text: str, sizes: dict[str, int]) -> None:
    found = [place for cell in parse(text).cells(sizes) for place in cell_places(cell)]
    assert len(found) == len(dict(found))
    assert dict(found) == places(text, sizes)


@PROPERTY
@given(layouts())
def test_axes_are_those_of_the_text_in_reading_order(text: str) -> None:
    assert list(dict.fromkeys(parse(text).axes)) == list(dict.fromkeys(re.findall(f"[{AXES}]", text)))


@PROPERTY
@given(layouts(), sizes_of(), st.sampled_from(["", " ", "  ", "\t"]))
def test_space_around_brackets_changes_nothing(text: str, sizes: dict[str, int], space: str) -> None:
    spaced = space + re.sub(r"([()\[\]])", rf"{space}\1{space}", text) + space
    assert parse(spaced).cells(sizes) == parse(text).cells(sizes)


@PROPERTY
@given(layouts(), sizes_of())
def test_a_layout_prints_as_a_text_that_means_the_same(text: str, sizes: dict[str, int]) -> None:
    printed = " ".join(str(dim) for dim in parse(text + "/tp").dims)
    assert parse(printed).dims == parse(text + "/tp").dims
    assert places(printed, sizes) == places(text, sizes)


def test_padding_cells_are_filler_and_may_be_empty() -> None:
    cells = parse("[v pad] h").cells({"v": 3, "pad": 0, "h": 2})
    assert [cell.filler for cell in cells] == ["", "pad"]
    assert list(cell_places(cells[1])) == []
    assert parse("[v pad] h").shape({"v": 3, "pad": 0, "h": 2}) == (3, 2)
    assert Cell({"zero_h": 1}, (0,), ({"zero_h": 1},)).filler == "zero_h"


def tiles(cuts: tuple[Cut, ...], extent: int) -> bool:
    """Whether the cuts follow each other from 0 to `extent`."""
    edges = [0, *(cut.stop for cut in cuts)]
    return [cut.start for cut in cuts] == edges[:-1] and edges[-1] == extent


@PROPERTY
@given(layouts(), sizes_of(), MESHES, st.integers(1, 6), st.data())
def test_a_mesh_cuts_a_dimension_into_equal_parts(
    text: str, sizes: dict[str, int], mesh: str, count: int, data: st.DataObject
) -> None:
    dims = [write(dim) for dim in read(text)]
    marked = data.draw(st.integers(0, len(dims) - 1))
    layout = parse(" ".join(dim + f"/{mesh}" * (n == marked) for n, dim in enumerate(dims)))
    extent = shape_of(text, sizes)[marked]
    if extent % count:
        with pytest.raises(LayoutError):
            layout.cuts(sizes, {mesh: count})
        return
    cuts = layout.cuts(sizes, {mesh: count})
    assert len(cuts) == len(dims)
    assert tiles(cuts[marked], extent)
    assert [cut.stop - cut.start for cut in cuts[marked]] == [extent // count] * count
    assert [cut.at for cut in cuts[marked]] == [((mesh, rank),) for rank in range(count)]
    assert all(tiles(other, size) for other, size in zip(cuts, shape_of(text, sizes), strict=True))


@PROPERTY
@given(st.lists(st.integers(1, 4), min_size=1, max_size=4), st.integers(1, 4), MESHES)
def test_marks_inside_a_sum_cut_every_alternative(parts: list[int], count: int, mesh: str) -> None:
    names = AXES[: len(parts)]
    layout = parse("[" + " ".join(f"{name}/{mesh}" for name in names) + "]")
    cuts = layout.cuts({name: part * count for name, part in zip(names, parts, strict=True)}, {mesh: count})[0]
    assert tiles(cuts, sum(parts) * count)
    assert [cut.stop - cut.start for cut in cuts] == [part for part in parts for _ in range(count)]
    assert [dict(cut.at)[mesh] for cut in cuts] == list(range(count)) * len(parts)


@PROPERTY
@given(st.integers(1, 6), st.integers(1, 4), st.integers(1, 3))
def test_each_gives_every_index_its_own_part(experts: int, width: int, tp: int) -> None:
    sizes = {"e": experts, "f": width * tp}
    cuts = parse("e/each f/tp").cuts(sizes, {"tp": tp})
    assert [(cut.start, cut.stop) for cut in cuts[0]] == [(i, i + 1) for i in range(experts)]
    assert [(cut.start, cut.stop) for cut in cuts[1]] == [(i * width, (i + 1) * width) for i in range(tp)]


@pytest.mark.parametrize("text", ["[gate/tp up/tp] h", "(gate up)/tp h", "h [gate up]/tp"])
def test_a_cut_that_is_not_even_is_refused_with_the_text(text: str) -> None:
    with pytest.raises(LayoutError, match=re.escape(text)):
        parse(text).cuts({"gate": 5, "up": 5, "h": 2}, {"tp": 3})


def test_a_mesh_of_unknown_size_does_not_cut() -> None:
    sizes = {"v": 4, "h": 1}
    assert [(cut.start, cut.stop) for cut in parse("v/tp h").cuts(sizes, {})[0]] == [(0, 4)]
