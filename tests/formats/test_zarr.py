"""Zarr arrays, written and read: tensorstore, zarr-python and torch see the same numbers, and damage is refused."""

from __future__ import annotations

import json
import os
import resource
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import product
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import torch
import zarr
from damage import MANIFEST, flip, refusal, weights
from hf_models import make_model, read_files
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

import transcoder
from transcoder.formats.grids import Grid, cut, parts
from transcoder.formats.opening import open_store
from transcoder.formats.shards import crc32c, emit, parse
from transcoder.spec import DTYPES

FORMS = ("zarr", "zarr3")
DOCUMENT = {"zarr": ".zarray", "zarr3": "zarr.json"}
FC2 = "decoder.layers.mlp.linear_fc2.weight"
GRID = {"tp": 2, "pp": 2, "make_vocab_size_divisible_by": 8}
CAPS = {"zarr": 900, "zarr3": 150}  # bytes: arrays of several files, and files of several chunks
Good = Callable[[str], Path]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The model `source` and a checkpoint of it in every format; bands and chunks are tiny."""
    root = tmp_path_factory.mktemp("zarr")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcoder.engine.BAND", 160)
        patch.setattr("transcoder.formats.zarr_writer.CAPS", CAPS)
        make_model("llama", root / "source")
        for form in (*FORMS, "torch_dist"):
            transcoder.hf2mcore(root / "source", root / form, format=form, sync=False, **GRID)
        yield root


@pytest.fixture
def copy(place: Path, tmp_path: Path) -> Good:
    """The iteration directory of a copy in a format, without the manifest: it must be refused for what it is."""

    def make(form: str) -> Path:
        shutil.copytree(place / form, tmp_path / "mcore", symlinks=True)
        (tmp_path / "mcore" / "iter_0000000" / MANIFEST).unlink()
        return tmp_path / "mcore" / "iter_0000000"

    return make


def opened(folder: Path, form: str) -> Any:
    """An array as tensorstore opens it."""
    spec = {"driver": form, "kvstore": {"driver": "file", "path": f"{folder}/"}}
    return tensorstore.open(spec, read=True).result()


def torch_arrays(folder: Path) -> dict[str, Any]:
    """Every tensor of a torch_dist checkpoint, whole, as torch reads it."""
    rows = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata.items()
    state = {
        key: torch.empty(tuple(row.size), dtype=row.properties.dtype)
        for key, row in rows
        if isinstance(row, TensorStorageMetadata)
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)
    return {key: tensor.view(torch.uint8).numpy() for key, tensor in state.items()}


@pytest.mark.parametrize("form", FORMS)
def test_tensorstore_reads_what_torch_reads_of_our_torch_dist(place: Path, form: str) -> None:
    folder = place / form / "iter_0000000"
    expected = torch_arrays(place / "torch_dist" / "iter_0000000")
    assert {path.parent.name for path in folder.glob(f"*/{DOCUMENT[form]}")} == expected.keys()
    for key, bits in expected.items():
        array = opened(folder / key, form).read().result()
        assert array.tobytes() == bits.tobytes(), key
    assert len([path for path in folder.rglob("*") if path.is_file()]) > 50


def test_zarr_python_reads_what_it_has_types_for(place: Path, tmp_path: Path) -> None:
    for form, dtype in product(FORMS, ("float32", "float16")):
        target = tmp_path / f"{form}-{dtype}"
        transcoder.hf2mcore(place / "source", target, format=form, dtype=dtype, sync=False, **GRID)
        folder, count = target / "iter_0000000", 0
        for document in folder.glob(f"*/{DOCUMENT[form]}"):
            array = zarr.open_array(str(document.parent), mode="r")
            assert (
                array.dtype == dtype and array[...].tobytes() == opened(document.parent, form).read().result().tobytes()
            )
            count += 1
        assert count == 9
    assert sorted(zarr.open_group(str(folder), mode="r").array_keys())[-1] == "output_layer.weight"


@pytest.mark.parametrize("form", FORMS)
def test_an_export_gives_the_source_back_and_every_command_reads_the_format(
    place: Path, tmp_path: Path, form: str
) -> None:
    transcoder.mcore2hf(place / form, tmp_path / "back", sync=False)
    assert read_files(tmp_path / "back") == read_files(place / "source")
    assert transcoder.check(place / form)["format"] == transcoder.inspect(place / form)["format"] == form
    assert transcoder.verify(place / form, place / "source")["differences"] == []
    assert (
        transcoder.open_checkpoint(place / form)[FC2].shape == opened(place / form / "iter_0000000" / FC2, form).shape
    )
    assert dict(transcoder.stream_hf(place / form)).keys() == dict(transcoder.stream_hf(place / "source")).keys()
    transcoder.roundtrip(place / "source", megatron_load_path=place / form)


@pytest.mark.parametrize(("one", "two"), [(a, b) for a, b in product((*FORMS, "torch_dist"), repeat=2) if a != b])
def test_resharding_to_another_format_gives_what_an_import_gives(
    place: Path, tmp_path: Path, one: str, two: str
) -> None:
    transcoder.reshard(place / one, tmp_path / "new", format=two, sync=False, **GRID)
    ours, theirs = tmp_path / "new" / "iter_0000000", place / two / "iter_0000000"
    names = {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file() and path.name != MANIFEST}
    assert {path.relative_to(ours) for path in ours.rglob("*") if path.is_file() and path.name != MANIFEST} == names
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in names)


@pytest.mark.parametrize("form", FORMS)
def test_no_byte_depends_on_workers_or_place(place: Path, tmp_path: Path, form: str) -> None:
    transcoder.hf2mcore(place / "source", tmp_path / "other", format=form, workers=4, **GRID)
    for path in (place / form).rglob("*"):
        if path.is_file():
            assert (tmp_path / "other" / path.relative_to(place / form)).read_bytes() == path.read_bytes(), path


@pytest.mark.parametrize("form", FORMS)
def test_a_chunk_that_is_missing_short_long_or_no_file_is_refused(copy: Good, tmp_path: Path, form: str) -> None:
    folder = copy(form)
    chunks = sorted(path for path in (folder / FC2).rglob("*") if path.is_file() and path.name != DOCUMENT[form])
    assert len(chunks) >= 6
    for path in chunks[:: len(chunks) // 6]:
        data, name = path.read_bytes(), path.relative_to(folder).as_posix()
        path.unlink()
        assert "no such file" in str(refusal(folder, name).problems[0])
        for wrong in (b"", data[:-1], *([data + b"\0"] if form == "zarr" else [])):
            path.write_bytes(wrong)
            refusal(folder, name)
        path.unlink()
        path.mkdir()
        refusal(folder, name)
        path.rmdir()
        os.mkfifo(path)
        refusal(folder, name)
        path.unlink()
        (tmp_path / "outside").write_bytes(data)
        path.symlink_to(tmp_path / "outside")
        refusal(folder, name)
        path.unlink()
        path.write_bytes(data)
    assert weights(folder)


@pytest.mark.parametrize("form", FORMS)
def test_a_folder_that_leads_out_of_the_checkpoint_is_refused(copy: Good, tmp_path: Path, form: str) -> None:
    folder = copy(form)
    (folder / FC2).rename(tmp_path / "outside")
    (folder / FC2).symlink_to(tmp_path / "outside")
    assert refusal(folder, FC2).kind == "link"


BLOSC = {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}
WRONG: dict[str, list[tuple[str, Any]]] = {
    "zarr": [
        ("compressor", BLOSC), ("compressor", {"id": "zlib", "level": 1}), ("filters", [{"id": "delta"}]),
        ("order", "F"),
        ("zarr_format", 3), ("zarr_format", "2"), ("zarr_format", True), ("dtype", "|O"), ("dtype", ">f4"),
        ("dtype", [["a", "<f4"]]), ("dtype", "<M8[ns]"), ("dtype", None), ("shape", [1 << 62, 1, 1]), ("shape", []),
        ("shape", [4.0, 1, 1]), ("shape", [-1, 1, 1]), ("shape", [0, 96, 64]), ("shape", "abc"), ("shape", [10**9] * 3),
        ("chunks", [0, 1, 1]), ("chunks", [1, 1]), ("chunks", [1, 1, 1]), ("chunks", None), ("chunks", [1] * 5000),
        ("dimension_separator", "../"), ("dimension_separator", None),
    ],
    "zarr3": [
        ("zarr_format", 2), ("node_type", "group"), ("data_type", "complex64"), ("data_type", {"name": "r16"}),
        ("shape", [1 << 40, 1 << 40, 1]), ("shape", [-1]), ("codecs", []), ("codecs", [{"name": "gzip"}]),
        ("codecs", [{"name": "bytes", "configuration": {"endian": "big"}}]), ("codecs", "bytes"), ("codecs", [1]),
        ("chunk_grid", {"name": "rectilinear"}),
        ("chunk_key_encoding", {"name": "default", "configuration": {"separator": "/../"}}),
        ("chunk_key_encoding", {"name": "v9"}), ("storage_transformers", [{"name": "x"}]), ("chunk_grid", None),
        ("codecs", [{"name": "sharding_indexed", "configuration": {"chunk_shape": [5, 7, 11]}}]),
        ("codecs", [{"name": "sharding_indexed", "configuration": 7}]),
    ],
}  # fmt: skip


@pytest.mark.parametrize(("form", "field", "value"), [(form, *row) for form in FORMS for row in WRONG[form]])
def test_a_description_that_is_not_ours_is_refused_by_its_name(copy: Good, form: str, field: str, value: Any) -> None:
    folder = copy(form)
    path = folder / FC2 / DOCUMENT[form]
    path.write_text(json.dumps(json.loads(path.read_text()) | {field: value}))
    refusal(folder, FC2, f"{FC2}/{DOCUMENT[form]}")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", ["", "[]", "null", "{", '{"shape": [1], "shape": [2]}', "[" * 10**5, "NaN", "\udcff"])
def test_a_description_that_is_no_table_is_refused(copy: Good, form: str, text: str) -> None:
    folder = copy(form)
    (folder / FC2 / DOCUMENT[form]).write_bytes(text.encode("utf-8", "surrogateescape"))
    refusal(folder, FC2, f"{FC2}/{DOCUMENT[form]}")


def test_a_shard_whose_index_lies_is_refused(copy: Good) -> None:
    folder = copy("zarr3")
    path = next(path for path in sorted((folder / FC2 / "c").rglob("0")) if path.is_file())
    grid = json.loads((folder / FC2 / "zarr.json").read_text())
    inner = grid["codecs"][0]["configuration"]["chunk_shape"]
    count = prod(grid["chunk_grid"]["configuration"]["chunk_shape"]) // prod(inner)
    length, data, name = 16 * count + 4, path.read_bytes(), path.relative_to(folder).as_posix()
    assert count > 2 and data[-length:] == emit(count, 2 * prod(inner))
    rows = list(parse(data[-length:]) or ())
    size, absent = 2 * prod(inner), (1 << 64) - 1
    lies = [
        (absent, absent),
        (rows[1][0], size),
        (rows[0][0] + 1, size),
        (rows[0][0], size - 1),
        (len(data), size),
        (absent - 8, size),
    ]
    for lie in lies:
        entries = b"".join(struct.pack("<QQ", *row) for row in (lie, *rows[1:]))
        path.write_bytes(data[:-length] + entries + struct.pack("<I", crc32c(entries)))
        refusal(folder, name)
    path.write_bytes(data)
    for at in (len(data) - 1, len(data) - length, len(data) - length // 2):
        flip(path, at)
        refusal(folder, name)
        flip(path, at)
    assert weights(folder)


@pytest.mark.parametrize("form", FORMS)
def test_any_changed_payload_byte_is_damage_where_there_is_a_manifest(place: Path, tmp_path: Path, form: str) -> None:
    shutil.copytree(place / form, tmp_path / "mcore", symlinks=True)
    folder = tmp_path / "mcore" / "iter_0000000"
    for path in sorted(folder.glob("decoder.*/**/0*"))[::25]:
        if path.is_file():
            flip(path, path.stat().st_size // 3)
            refusal(folder, *(name for name in dict(transcoder.stream_hf(place / "source"))))
            with pytest.raises(transcoder.DifferenceError, match=path.relative_to(folder).as_posix()):
                transcoder.check(folder)
            flip(path, path.stat().st_size // 3)


def test_training_state_locks_and_objects_are_counted_and_never_opened(copy: Good) -> None:
    folder = copy("zarr")
    before = weights(folder)
    for name in ("optimizer.state.exp_avg.decoder.final_layernorm.weight", "rng_state"):
        (folder / name).mkdir()
        (folder / name / ".zarray").write_text("not even JSON")
    (folder / "optimizer.x.sync").mkdir()
    for path in folder.glob("*/shard_*.pt"):
        path.write_bytes(b"cos\nsystem\n(S'touch hacked'\ntR.")
    assert weights(folder) == before
    found = transcoder.inspect(folder)
    assert found["objects"] > 3 and sum("training state" in row for row in found["warnings"]) == 2


@pytest.mark.parametrize("form", FORMS)
def test_an_unfinished_directory_is_no_checkpoint(copy: Good, form: str) -> None:
    folder = copy(form)
    (folder / "metadata.json").unlink()
    with pytest.raises(transcoder.InputError):
        transcoder.inspect(folder)


def test_files_cannot_be_linked_and_unknown_formats_are_told(place: Path, tmp_path: Path) -> None:
    with pytest.raises(transcoder.UsageError, match="link"):
        transcoder.reshard(place / "zarr", tmp_path / "new", format="zarr", link=True)
    with pytest.raises(transcoder.UsageError, match="torch_dist, zarr, zarr3"):
        transcoder.hf2mcore(place / "source", tmp_path / "new", format="zarr4")


def test_without_tensorstore_zarr_is_read_but_not_written(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcoder.formats.zarr_witness.find_spec", lambda name: None)
    with pytest.raises(transcoder.UsageError, match="tensorstore"):
        transcoder.hf2mcore(place / "source", tmp_path / "new", format="zarr")
    transcoder.mcore2hf(place / "zarr", tmp_path / "back", sync=False)


def test_what_tensorstore_sees_otherwise_does_not_appear(
    place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcoder.formats.zarr_documents.V2_NAMES", {"bfloat16": "<f2"})
    with pytest.raises(RuntimeError, match="tensorstore sees"):
        transcoder.hf2mcore(place / "source", tmp_path / "new", format="zarr", sync=False)
    assert not (tmp_path / "new").exists()


def test_a_thousand_files_need_few_descriptors(place: Path, tmp_path: Path) -> None:
    code = (
        "import sys, transcoder, transcoder.formats.zarr_writer as w; w.CAPS = {'zarr': 40}\n"
        "transcoder.hf2mcore(sys.argv[1], sys.argv[2], format='zarr', workers=4, tp=2)\n"
        "transcoder.mcore2hf(sys.argv[2], sys.argv[3], workers=4)\n"
        "assert transcoder.verify(sys.argv[2], sys.argv[1])['differences'] == []; transcoder.check(sys.argv[2])\n"
    )
    subprocess.run(
        [sys.executable, "-c", code, place / "source", tmp_path / "mcore", tmp_path / "back"],
        check=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (400, 400)),
    )
    assert len([path for path in (tmp_path / "mcore").rglob("*") if path.is_file()]) > 600
    assert read_files(tmp_path / "back") == read_files(place / "source")


@st.composite
def arrays(draw: st.DrawFn) -> tuple[str, tuple[int, ...], tuple[int, ...], tuple[int, ...], str, str]:
    """Driver, shape, file's chunk, inner chunk, type and separator or index location."""
    form = draw(st.sampled_from(FORMS))
    rank = draw(st.integers(1, 4))
    shape = tuple(draw(st.lists(st.integers(1, 7), min_size=rank, max_size=rank)))
    inner = tuple(draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    times = tuple(draw(st.lists(st.integers(1, 3), min_size=rank, max_size=rank)))
    cell = tuple(a * b for a, b in zip(inner, times, strict=True)) if form == "zarr3" else inner
    return (
        form,
        shape,
        cell,
        inner,
        draw(st.sampled_from(["bfloat16", "float16", "float32"])),
        draw(st.sampled_from("/.")),
    )


@settings(max_examples=60, deadline=None)
@given(arrays(), st.sampled_from(["start", "end", "none"]))
def test_any_grid_that_tensorstore_writes_is_read(
    tmp_path_factory: pytest.TempPathFactory, array: tuple[Any, ...], location: str
) -> None:
    form, shape, cell, inner, dtype, separator = array
    folder = tmp_path_factory.mktemp("grid")
    if form == "zarr":
        metadata: dict[str, Any] = {"chunks": cell, "compressor": None, "dimension_separator": separator}
    else:
        plain = [{"name": "bytes", "configuration": {"endian": "little"}}]
        index = {"index_codecs": [*plain, {"name": "crc32c"}], "index_location": location}
        sharding = {"name": "sharding_indexed", "configuration": {"chunk_shape": inner, "codecs": plain, **index}}
        metadata = {
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": cell}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": separator}},
            "codecs": plain if location == "none" else [sharding],
        }
    spec = {"driver": form, "kvstore": {"driver": "file", "path": f"{folder / 'x'}/"}, "metadata": metadata}
    spec |= {"store_data_equal_to_fill_value": True}
    store = tensorstore.open(spec, create=True, dtype=getattr(tensorstore, dtype), shape=shape).result()
    bits = np.random.default_rng(prod(shape)).integers(1, 1 << 14, shape).astype(f"<u{DTYPES[dtype].size}")
    store.write(bits.view(store.dtype.numpy_dtype)).result()
    (folder / "metadata.json").write_text(json.dumps({"sharded_backend": form}))
    found = np.zeros(shape, bits.dtype)
    for chunk in open_store(folder).catalog["x"].chunks:
        data = (folder / chunk.file).read_bytes()[chunk.offset : chunk.offset + chunk.nbytes]
        place = tuple(slice(*extent) for extent in chunk.box)
        assert not found[place].any(), "two chunks hold an element"
        found[place] = np.frombuffer(data, bits.dtype).reshape(found[place].shape)
    assert (found == bits).all()


@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(1, 200))
def test_a_cut_divides_evenly_and_ends_below_the_limit(shape: list[int], limit: int) -> None:
    found = cut(tuple(shape), limit)
    assert all(size % step == 0 for size, step in zip(shape, found, strict=True)) and prod(found) <= limit


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=1, max_size=4))
def test_parts_of_a_cell_are_its_rows_inside_the_array(sizes: list[tuple[int, int]]) -> None:
    shape, cell = tuple(n for n, _ in sizes), tuple(n for _, n in sizes)
    numbers = np.arange(prod(cell)).reshape(cell)
    kept = numbers[tuple(slice(0, n) for n in shape)]
    found = np.full(kept.shape, -1)
    for box, offset in parts(tuple((0, n) for n in cell), shape, 1):
        size = prod(high - low for low, high in box)
        place = tuple(slice(*extent) for extent in box)
        found[place] = np.arange(offset, offset + size).reshape(found[place].shape)
    assert (found == kept).all()
    assert Grid(DTYPES["float32"], shape, cell, cell).counts == tuple(-(-a // b) for a, b in sizes)
