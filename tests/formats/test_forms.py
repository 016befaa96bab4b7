"""Records that are written from a form have the bytes of records written one by one."""

from __future__ import annotations

import pickle

from hypothesis import given
from hypothesis import strategies as st

from transcoder.formats.forms import HOLE, Filled, Form, Sizes
from transcoder.formats.pickles import Global, Pairs, Record, dumps, loads

KEY, SIZE, INFO = Global("m", "Key"), Global("torch", "Size"), Global("m", "Info")
SIZED = Record(SIZE, (HOLE,))
Row = tuple[str, tuple[int, ...], tuple[int, ...], int]
NUMBERS = st.integers(-(1 << 70), 1 << 70) | st.sampled_from([0, 255, 256, 65535, 65536, (1 << 31) - 1, 1 << 31])
SHAPES = st.lists(NUMBERS, max_size=5).map(tuple)
ROWS = st.lists(st.tuples(st.sampled_from(["a", "b", "long.name", "é"]), SHAPES, SHAPES, NUMBERS), max_size=90)


def plain(rows: list[Row]) -> Pairs:
    """Every record by itself."""
    return Pairs(
        (Record(KEY, (key, Record(SIZE, (one,)), None)), Record(INFO, (Record(SIZE, (two,)), "file", number)))
        for key, one, two, number in rows
    )


def formed(rows: list[Row]) -> Pairs:
    """The same from two forms."""
    key_form, info_form = Form(Record(KEY, (HOLE, SIZED, None))), Form(Record(INFO, (SIZED, "file", HOLE)))
    return Pairs(
        (Filled(key_form, (key, Sizes(one))), Filled(info_form, (Sizes(two), number))) for key, one, two, number in rows
    )


@given(ROWS, st.sampled_from([2, 4]))
def test_a_filled_form_has_the_bytes_of_its_record(rows: list[Row], protocol: int) -> None:
    assert dumps(formed(rows), protocol) == dumps(plain(rows), protocol)


def test_slot_numbers_of_one_byte_and_of_four_are_both_right() -> None:
    rows: list[Row] = [(f"key.{i % 7}", (i, 0, 7168), (i, 128), i << 20) for i in range(3000)]
    for count in (1, 2, 20, 40, 41, 42, 43, 44, 45, 46, 300, 3000):
        assert dumps(formed(rows[:count])) == dumps(plain(rows[:count])), count
    assert len(dumps(formed(rows))) > 3000 * 60


def test_python_itself_reads_what_a_form_wrote() -> None:
    pair = Form(Record(Global("builtins", "complex"), (HOLE, HOLE)))
    values = [Filled(pair, (i, 2 * i)) for i in range(700)]
    data = dumps(values)  # type: ignore[arg-type]
    assert pickle.loads(data) == [complex(i, 2 * i) for i in range(700)]
    found = loads(data, None, "file")
    assert isinstance(found, list)
    assert found[699].args == (699, 1398)
