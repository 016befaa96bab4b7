"""A small Megatron checkpoint to damage, and what a refused or accepted export of it must look like."""

from __future__ import annotations

import io
import pickle
import shutil
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hf_models import make_model, read_files
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, TensorStorageMetadata

import transcoder
from transcoder import InputError

MANIFEST = "transcode-manifest.json"


def make_good(place: Path) -> Path:
    """A checkpoint of four ranks, `mcore`, and the model that it was made from, `source`."""
    make_model("llama", place / "source")
    transcoder.hf2mcore(place / "source", place / "mcore", tp=2, pp=2, sync=False)
    return place


def copied(good: Path, place: Path) -> Path:
    """The iteration directory of a copy that may be damaged."""
    shutil.copytree(good / "mcore", place / "mcore", symlinks=True)
    return place / "mcore" / "iter_0000000"


def refusal(checkpoint: Path, *names: str) -> InputError:
    """The refusal of an export: it names a tensor or file of `names`, and nothing is visible."""
    place = checkpoint.parent / "place"
    place.mkdir(exist_ok=True)
    try:
        transcoder.mcore2hf(checkpoint, place / "hf", workers=1, sync=False)
    except InputError as error:
        assert error.exit_code == 3
        assert not list(place.iterdir()), "a refused export left something behind"
        found = {text for problem in error.problems for text in (problem.tensor, problem.file)}
        assert found & set(names) or any(name in str(error) for name in names), f"none of {names} is named: {error}"
        return error
    pytest.fail(f"accepted: {names}")


def hf_names(good: Path) -> list[str]:
    """Names of the model's tensors."""
    return [entry.name for entries in read_files(good / "source").values() for entry in entries]


def weights(checkpoint: Path) -> dict[str, bytes]:
    """The exported tensors by name."""
    place = checkpoint.parent / "exported"
    transcoder.mcore2hf(checkpoint, place, workers=1, sync=False)
    found = {entry.name: entry.data for entries in read_files(place).values() for entry in entries}
    shutil.rmtree(place)
    return found


def load(folder: Path) -> Metadata:
    """The plan, as torch reads it."""
    found: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    return found


def store(folder: Path, plan: Metadata) -> None:
    """Write the plan as torch does; the manifest goes, so that nothing but the plan can show the damage."""
    (folder / MANIFEST).unlink(missing_ok=True)
    (folder / ".metadata").write_bytes(pickle.dumps(plan))


def tensors(plan: Metadata) -> dict[str, TensorStorageMetadata]:
    """The plan's tensors by key."""
    rows = plan.state_dict_metadata.items()
    return {key: row for key, row in rows if isinstance(row, TensorStorageMetadata)}


def items(plan: Metadata) -> Iterator[tuple[MetadataIndex, Any]]:
    """Every stored chunk with its place."""
    known = tensors(plan)
    return ((index, info) for index, info in plan.storage_data.items() if index.fqn in known)


def payload_of(folder: Path, info: Any) -> tuple[int, int]:
    """First byte and size of an item's payload in its file."""
    item = (folder / info.relative_path).read_bytes()[info.offset : info.offset + info.length]
    with zipfile.ZipFile(io.BytesIO(item)) as archive:
        record = next(row for row in archive.infolist() if row.filename.endswith("/data/0"))
    named, extra = (int.from_bytes(item[record.header_offset + at :][:2], "little") for at in (26, 28))
    return info.offset + record.header_offset + 30 + named + extra, record.file_size


def flip(path: Path, at: int, mask: int = 1) -> None:
    """Change bits of one byte."""
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)
