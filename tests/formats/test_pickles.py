"""The inert pickle reader and the emitter, against CPython's pickle and against hostile input."""

import contextlib
import pickle
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.errors import InputError
from transcoder.formats.pickles import Global, Pairs, Persistent, Record, dumps, loads

LEAVES = (
    st.none() | st.booleans() | st.integers(-(2**120), 2**120) | st.floats(allow_nan=False) | st.text() | st.binary()
)
VALUES = st.recursive(
    LEAVES,
    lambda v: st.lists(v) | st.lists(v).map(tuple) | st.dictionaries(st.text(), v),
    max_leaves=30,
)
SAMPLE = {
    "size": torch.Size([3, 4]),
    "args": SimpleNamespace(a=1, b=[1.5, None, "x"], c=(True, -5, 2**40, 70000)),
    "dtype": torch.bfloat16,
    "ordered": OrderedDict(z=1),
}


def plain(value):
    if isinstance(value, Pairs):
        return {key: plain(item) for key, item in value}
    if isinstance(value, list | tuple):
        return type(value)(plain(item) for item in value)
    return value


@settings(max_examples=150, deadline=None)
@given(VALUES, st.sampled_from((2, 4)))
def test_values_survive_both_ways(value, protocol):
    data = dumps(value, protocol)
    assert pickle.loads(data) == value
    assert plain(loads(data, frozenset({("_codecs", "encode")}), "x")) == value
    assert plain(loads(memoryview(pickle.dumps(value, 4)), frozenset(), "x")) == value


@pytest.mark.parametrize("count", [0, 1, 2, 999, 1001, 2500])
def test_protocol_2_has_the_bytes_of_cpython(count):
    value = {"list": list(range(count)), "dict": {f"k{i}": (i, [i]) for i in range(count)}, "t": (1, 2, 3, -4)}
    assert dumps(value, 2) == pickle.dumps(value, 2)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_names_become_records(protocol):
    found = loads(pickle.dumps(SAMPLE, protocol), None, "x").as_dict()
    assert found["size"] == (3, 4) and found["dtype"] == Global("torch", "bfloat16")
    assert found["args"].callable == Global("types", "SimpleNamespace")
    assert found["args"].state.as_dict()["c"] == (True, -5, 2**40, 70000)
    assert found["ordered"].items == [("z", 1)]
    for out in (2, 4):
        assert pickle.loads(dumps(loads(pickle.dumps(SAMPLE, protocol), None, "x"), out))["args"] == SAMPLE["args"]


def test_records_are_made_by_real_classes():
    size = Record(Global("torch", "Size"), ((2, 3),))
    space = Record(Global("types", "SimpleNamespace"), (), {"size": size})
    for protocol in (2, 4):
        assert pickle.loads(dumps([space, space], protocol)) == [SimpleNamespace(size=torch.Size([2, 3]))] * 2
    assert loads(dumps(Persistent(("storage", 1))), frozenset(), "x") == Persistent(("storage", 1))


def test_pairs_want_distinct_strings():
    for pairs in (Pairs([(1, 2)]), Pairs([("a", 1), ("a", 2)])):
        with pytest.raises(InputError):
            pairs.as_dict()


TUPLE_BOMB = b"\x80\x02)q\x00" + b"h\x00h\x00\x86q\x00" * 40 + b"."
HOSTILE = {
    "system": b"\x80\x02cos\nsystem\nX\x02\x00\x00\x00id\x85R.",
    "stack global": b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x02id\x85R.",
    "dotted": b"\x80\x04\x8c\x05torch\x8c\x0bos.bfloat16\x93.",
    "memo index": b"\x80\x02Nr\xff\xff\xff\x7f.",
    "long string": b"\x80\x02X\xff\xff\xff\x7fa.",
    "string over the limit": b"\x80\x02X\x00\x00\x02\x00" + b"a" * 0x20000 + b".",
    "long integer": b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".",
    "hash bomb": b"\x80\x02}" + TUPLE_BOMB[2:-1] + b"Ns.",
    "tuple bomb": TUPLE_BOMB,
    "deep": b"\x80\x02)" + b"\x85" * 100_000 + b".",
    "cycle": b"\x80\x02]q\x00h\x00a.",
    "build on a name": b"\x80\x02ctorch\nSize\n}b.",
    "call of a call": b"\x80\x02ctorch\nbfloat16\n)R)R.",
    "protocol 6": b"\x80\x06N.",
    "frame": b"\x80\x04\x95\xff\xff\xff\xff\xff\xff\xff\xffN.",
    "size of text": b"\x80\x02ctorch\nSize\nX\x01\x00\x00\x00a\x85\x85R.",
    "inst": b"(S'id'\nios\nsystem\n.",
    "persid": b"Pabc\n.",
    "extension": b"\x80\x02\x82\x01.",
    "empty": b"",
    "no value": b".",
    "two values": b"NN.",
    "open mark": b"(N.",
    "no mark": b"e.",
    "odd dict": b"}(Nu.",
    "below the mark": b"](\x85.",
    "bad text": b"X\x01\x00\x00\x00\xff.",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles_are_refused(name):
    with pytest.raises(InputError):
        loads(HOSTILE[name], frozenset({("torch", "Size"), ("torch", "bfloat16")}), "x")


def test_open_names_stay_inert():
    found = loads(HOSTILE["system"], None, "x")
    assert found == Record(Global("os", "system"), ("id",))


@pytest.mark.parametrize("protocol", [2, 4])
def test_every_cut_is_refused(protocol):
    data = pickle.dumps(SAMPLE, protocol)
    for end in range(len(data)):
        with pytest.raises(InputError):
            loads(data[:end], None, "x")


@settings(max_examples=600, deadline=None)
@given(st.sampled_from((2, 4)), st.lists(st.tuples(st.integers(0, 10_000), st.binary(max_size=6)), max_size=5))
def test_mutations_are_read_or_refused(protocol, edits):
    data = bytearray(pickle.dumps(SAMPLE, protocol))
    for at, new in edits:
        at %= len(data)
        data[at : at + len(new)] = new
    with contextlib.suppress(InputError):
        loads(bytes(data), None, "x")


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=60))
def test_noise_is_read_or_refused(data):
    with contextlib.suppress(InputError):
        loads(data, None, "x")
