"""Every pair of format, dialect, grid, norm names, dtype and architecture: read by others, resharded, exported."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from command_line import tree
from formats_matrix import (
    GRIDS,
    KINDS,
    Row,
    all_rows,
    bits,
    can_be,
    columns,
    covering,
    seen,
    shown,
    stages,
    successors,
    told,
)
from formats_matrix import wanted as expected
from zoo import KINDS as ALL_KINDS
from zoo import made, read

import transcoder
from transcoder.api import plan_hf2mcore

WHOLE = re.compile(r".*\.(e_score_correction_bias|mixer\.A_log|mixer\.D|sinks)")  # stored in float32 always
OTHERS = tuple(sorted({*ALL_KINDS} - {*KINDS}))
Make = Callable[[Row], Path]


@cache
def sample(kinds: tuple[str, ...]) -> list[Row]:
    """A covering sample of what can be."""
    return covering([row for row in all_rows(kinds) if can_be(row) and told(row)])


@pytest.fixture
def imported(tmp_path: Path) -> Make:
    """The import of a row, made once and not to be changed."""

    @cache
    def make(row: Row) -> Path:
        target = tmp_path / f"{row}-{row.dtype}"
        transcoder.hf2mcore(made(row.kind), target, sync=False, **row.options)
        return target

    return make


def assert_cut(checkpoint: Path, row: Row) -> None:
    """The grid shows in the files: in parts of matrices, and in who wrote a layer."""
    tp, pp, _, etp = row.grid
    parts = columns(checkpoint, row.form)
    assert {n for key, n in parts.items() if key.endswith("self_attention.linear_proj.weight")} == {tp}
    assert {n for key, n in parts.items() if ".experts.experts." in key and "linear_fc2.weight" in key} <= {etp}
    assert row.form != "torch_dist" or stages(checkpoint) == pp


def check_row(row: Row, after: Row, imported: Make, place: Path) -> None:
    """Read one row with the format's own reader, reshard it to another and export that."""
    one = imported(row)
    assert seen(one, row.form) == expected(row)
    assert_cut(one, row)
    transcoder.reshard(one, place / "two", sync=False, **{**after.options, "layout": after.dialect})
    if row.dtype == "float16" and after.dtype != "float16":
        assert seen(place / "two", after.form) == expected(after, through="float16")
        assert_cut(place / "two", after)
    else:
        assert tree(place / "two") == tree(imported(after))
    transcoder.mcore2hf(place / "two", place / "back", dtype="bfloat16", sync=False)
    assert_exported(place / "back", made(row.kind), rounded="float16" in (row.dtype, after.dtype))


def assert_exported(found: Path, source: Path, *, rounded: bool) -> None:
    """The files of the source; or its tensors as far as float16 holds them."""
    if not rounded:
        assert tree(found) == tree(source)
        return
    tensors = {
        name: tensor if WHOLE.fullmatch(name) else tensor.half().to(tensor.dtype)
        for name, tensor in read(source).items()
    }
    assert {name: bits(each) for name, each in read(found).items()} == {n: bits(t) for n, t in tensors.items()}


def test_the_sample_shows_every_pair_that_can_be_and_few_rows() -> None:
    possible = [row for row in all_rows(KINDS) if can_be(row)]
    pairs = set().union(*map(shown, sample(KINDS)))
    assert pairs == set().union(*map(shown, possible)) and len(pairs) > 250
    assert len(sample(KINDS)) <= 60 < len(possible) // 20
    assert all(row.kind == after.kind and row != after for row, after in successors(sample(KINDS)).items())


@pytest.mark.parametrize("kind", KINDS)
def test_what_cannot_be_is_refused(kind: str) -> None:
    """One value at a time, so that each is refused for itself."""
    plain = Row(kind, "torch_dist", "", GRIDS[0], "te", "bfloat16")
    rows = [row for row in all_rows((kind,)) if len(shown(row, 1) - shown(plain, 1)) == 1]
    assert len(rows) > 12
    for row in rows:
        if can_be(row):
            plan_hf2mcore(made(kind), **row.options)
        else:
            with pytest.raises(transcoder.UsageError):
                plan_hf2mcore(made(kind), **row.options)


def check_kind(kind: str, rows: list[Row], imported: Make, place: Path) -> None:
    """Every row of a kind, and the way from it to the next."""
    mine = {row: after for row, after in successors(rows).items() if row.kind == kind}
    assert len(mine) >= 3
    for number, (row, after) in enumerate(mine.items()):
        check_row(row, after, imported, place / str(number))


@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_is_read_by_others_resharded_and_exported(kind: str, imported: Make, tmp_path: Path) -> None:
    check_kind(kind, sample(KINDS), imported, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_pair_of_every_one_is_read_by_others_resharded_and_exported(
    kind: str, imported: Make, tmp_path: Path
) -> None:
    check_kind(kind, sample((kind,)), imported, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("kind", OTHERS)
def test_other_architectures_are_read_by_others_resharded_and_exported(
    kind: str, imported: Make, tmp_path: Path
) -> None:
    check_kind(kind, sample(OTHERS), imported, tmp_path)
