"""The torch.save container, byte for byte against torch, and against hostile input."""

import io
import random
import zipfile
from argparse import Namespace
from mmap import ACCESS_READ, mmap
from zlib import crc32

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.errors import InputError
from transcoder.formats import archive as module
from transcoder.formats.archive import (
    archive,
    layout,
    read_archive,
    read_pickle,
    read_tensor,
    tensor_item,
    tensor_record,
)
from transcoder.formats.pickles import Global, Record, dumps
from transcoder.spec import DTYPES


def saved(value):
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def with_torch_id(monkeypatch, data):
    name = "archive/.data/serialization_id"
    monkeypatch.setattr(module, "SERIALIZATION_ID", zipfile.ZipFile(io.BytesIO(data)).read(name))
    tensor_item.cache_clear()


@pytest.fixture(autouse=True)
def fresh_items():
    yield
    tensor_item.cache_clear()


def rand(name, shape):
    count = 1
    for extent in shape:
        count *= extent
    raw = torch.randint(0, 2 if name == "bool" else 256, (count * DTYPES[name].size,), dtype=torch.uint8)
    return raw.view(getattr(torch, name)).reshape(shape)


def ours(name, shape, payload):
    item = tensor_item(DTYPES[name], shape)
    data = item.prefix + payload + item.suffix(crc32(payload))
    assert len(data) == item.length and item.payload_offset == len(item.prefix)
    return data


def payload_of(data):
    return zipfile.ZipFile(io.BytesIO(data)).read("archive/data/0")


@pytest.mark.parametrize("name", DTYPES)
def test_tensors_have_the_bytes_of_torch(name, monkeypatch):
    dice = random.Random(name)
    for shape in [(), (0,), (3, 0, 2), *(tuple(dice.choices((1, 2, 5, 64), k=k)) for k in (1, 2, 3, 4, 5))]:
        theirs = saved(rand(name, shape))
        with_torch_id(monkeypatch, theirs)
        payload = payload_of(theirs)
        assert ours(name, shape, payload) == theirs
        stored = read_tensor(memoryview(theirs), "x")
        assert (stored.dtype.name, stored.shape, stored.size) == (name, shape, len(payload))
        assert theirs[stored.start : stored.start + stored.size] == payload and stored.crc == crc32(payload)


def test_our_tensor_loads():
    value = rand("bfloat16", (1, 64, 3))
    data = ours("bfloat16", (1, 64, 3), value.view(torch.uint8).numpy().tobytes())
    loaded = torch.load(io.BytesIO(data), weights_only=True)
    assert torch.equal(loaded.view(torch.int16), value.view(torch.int16))


def test_objects_have_the_bytes_of_torch(monkeypatch):
    theirs = saved([None])
    with_torch_id(monkeypatch, theirs)
    assert archive(dumps([None])) == theirs
    theirs = saved([torch.empty(0, dtype=torch.uint8), torch.tensor(7)])
    with_torch_id(monkeypatch, theirs)
    records = [tensor_record(0, DTYPES["uint8"], (0,)), tensor_record(1, DTYPES["int64"], ())]
    assert len(theirs) == len(archive(dumps(records), [b"", (7).to_bytes(8, "little")]))
    data = archive(dumps(records), [b"", (7).to_bytes(8, "little")])
    assert torch.load(io.BytesIO(data))[1] == 7


def test_common_file_loads():
    data = archive(dumps({"args": Record(Global("argparse", "Namespace"), (), {"a": 1}), "iteration": 3}))
    with torch.serialization.safe_globals([Namespace]):
        assert torch.load(io.BytesIO(data)) == {"args": Namespace(a=1), "iteration": 3}
    assert read_pickle(memoryview(data), None, "x").as_dict()["iteration"] == 3


def test_layout_of_known_sizes():
    assert layout(163, 8192) == (704, 9769)
    assert layout(187, 6) == (768, 768 + 873)
    assert layout(163, 0) == (704, 704 + 809)


def test_archive_beyond_4_gib(tmp_path):
    shape = (1 << 16, (1 << 16) + 1)
    item = tensor_item(DTYPES["uint8"], shape)
    path = tmp_path / "big"
    with path.open("wb") as file:  # sparse
        file.write(item.prefix)
        file.seek(item.payload_size, 1)
        file.write(item.suffix(5))
    assert path.stat().st_size == item.length
    assert zipfile.ZipFile(path).getinfo("archive/data/0").file_size == item.payload_size
    with path.open("rb") as file, mmap(file.fileno(), 0, access=ACCESS_READ) as view, memoryview(view) as whole:
        stored = read_tensor(whole, "x")
    assert (stored.shape, stored.start, stored.crc) == (shape, item.payload_offset, 5)


def zipped(records, method=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as out:
        for name, data in records.items():
            out.writestr(name, data)
    return file.getvalue()


PICKLE = dumps(tensor_record(0, DTYPES["float32"], (2,)))
OLD = {"a/data.pkl": PICKLE, "a/data/0": bytes(8), "a/version": b"3\n"}


def test_old_archives_are_read():
    assert read_tensor(memoryview(zipped(OLD)), "x").size == 8


@pytest.mark.parametrize(
    "records",
    [
        {**OLD, "a/data/0": bytes(12)},
        {**OLD, "a/byteorder": b"big"},
        {**OLD, "b/x": b""},
        {**OLD, "a/constants.pkl": b""},
        {"a/data.pkl": PICKLE},
        {"data.pkl": PICKLE},
        {**OLD, "a/data.pkl": dumps([None])},
        {**OLD, "a/data.pkl": dumps(Record(Global("os", "system"), ("id",)))},
        {**OLD, "a/data.pkl": bytes(2 << 20)},
    ],
)
def test_wrong_records_are_refused(records):
    with pytest.raises(InputError):
        read_tensor(memoryview(zipped(records)), "x")


def test_compressed_records_are_refused():
    with pytest.raises(InputError, match="compressed"):
        read_tensor(memoryview(zipped(OLD, zipfile.ZIP_DEFLATED)), "x")


VIEWS = [torch.ones(4, 4)[1:], torch.ones(4, 4).T, torch.ones(8)[:2], torch.ones(1).expand(3)]


@pytest.mark.parametrize("tensor", VIEWS)
def test_views_are_refused(tensor):
    with pytest.raises(InputError):
        read_tensor(memoryview(saved(tensor)), "x")


GOOD = saved(torch.arange(6, dtype=torch.float32))
LOCAL = GOOD.index(b"archive/data/0") - 30
CENTRAL = GOOD.rindex(b"archive/data/0") - 46


@pytest.mark.parametrize(
    ("at", "new"),
    [
        (LOCAL, b"XX"),
        (LOCAL + 6, b"\x09"),
        (LOCAL + 8, b"\x08"),
        (LOCAL + 18, b"\x07"),
        (LOCAL + 30, b"x"),
        (CENTRAL + 8, b"\x09"),
        (CENTRAL + 10, b"\x08"),
        (CENTRAL + 16, b"\xff\xff"),
        (CENTRAL + 20, b"\x07"),
        (CENTRAL + 42, bytes(4)),  # another record's place
        (CENTRAL + 42, b"\xff\xff\xff\x7f"),
        (len(GOOD) - 6, bytes(4)),
        (len(GOOD) - 12, b"\x01\x00"),
    ],
)
def test_wrong_headers_are_refused(at, new):
    data = bytearray(GOOD)
    data[at : at + len(new)] = new
    with pytest.raises(InputError):
        read_tensor(memoryview(data), "x")


def test_overlapping_records_are_refused():
    data = GOOD.replace(b"archive/version", b"archive/data/00")  # one local, one central header
    assert "data/00" in read_archive(memoryview(data), "x")
    data = bytearray(data)
    second = data.rindex(b"archive/data/00") - 46
    data[second + 42 : second + 46] = data[CENTRAL + 42 : CENTRAL + 46]
    with pytest.raises(InputError):
        read_archive(memoryview(data), "x")


def test_every_cut_is_refused():
    for end in range(len(GOOD)):
        with pytest.raises(InputError):
            read_tensor(memoryview(GOOD)[:end], "x")


@settings(max_examples=500, deadline=None)
@given(st.lists(st.tuples(st.integers(0, len(GOOD) - 1), st.binary(min_size=1, max_size=8)), min_size=1, max_size=4))
def test_mutations_are_read_or_refused(edits):
    data = bytearray(GOOD)
    for at, new in edits:
        data[at : at + len(new)] = new
    try:
        stored = read_tensor(memoryview(data), "x")
    except InputError:
        return
    assert stored.start + stored.size <= len(data)


@pytest.mark.parametrize("name", ["bfloat16", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", [(5, 64), (), (3, 0, 2)])
def test_what_torch_wrote_is_recognised_by_its_bytes(name, shape):
    data, item = bytearray(saved(rand(name, shape))), module.tensor_item(DTYPES[name], shape)
    expected = read_tensor(memoryview(data), "x")
    assert item.read(memoryview(data)) == expected.crc
    assert (item.payload_offset, item.payload_size) == (expected.start, expected.size)
    assert item.read(memoryview(data)[:-1]) is None and item.read(memoryview(data + b"\0")) is None
    accepted = set()
    for place in range(len(data)):
        data[place] ^= 16
        if (found := item.read(memoryview(data))) is not None:
            accepted.add(place)
            assert found == read_tensor(memoryview(data), "x").crc
        data[place] ^= 16
    assert accepted == set(range(expected.start, expected.start + expected.size))
