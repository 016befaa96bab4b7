"""Checkpoints of zarr arrays: descriptions that lie, chunks that are missing, folders that lead out, pickled objects."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.opcodes import Call, Name, dumps
from attacks.pickles import SHELL

ARRAY = "embedding.word_embeddings.weight"
WORDS = "mcore2hf check"
GADGET = dumps(Call(Name("os", "system"), (SHELL,)))
FIELDS: dict[str, dict[str, Any]] = {
    "zarr": {
        "compressor_blosc": {"compressor": {"id": "blosc"}}, "compressor_pickle": {"compressor": {"id": "pickle"}}, "objects": {"dtype": "|O"},
        "pickled_filter": {"filters": [{"id": "pickle"}]}, "fortran": {"order": "F"}, "exabyte": {"shape": [1 << 60, 8]}, "cells_of_one": {"chunks": [1, 1], "shape": [1 << 30, 1 << 30]},
        "overflow": {"shape": [1 << 62, 1 << 62], "chunks": [1 << 61, 1 << 61]}, "separator_leaves": {"dimension_separator": "/../"}, "many_dims": {"shape": [1] * 4000, "chunks": [1] * 4000},
        "negative": {"shape": [-64, -8]}, "no_chunks": {"chunks": [0, 0]}, "text_shape": {"shape": "64"}, "huge_rows": {"chunks": [64, 1 << 50]},
    },
    "zarr3": {
        "gzip": {"codecs": [{"name": "gzip"}]}, "big_endian": {"codecs": [{"name": "bytes", "configuration": {"endian": "big"}}]}, "exabyte": {"shape": [1 << 60, 8]},
        "transformers": {"storage_transformers": [{"name": "x"}]}, "separator_leaves": {"chunk_key_encoding": {"name": "default", "configuration": {"separator": "/../"}}},
        "group": {"node_type": "group"}, "complex": {"data_type": "complex128"}, "no_codecs": {"codecs": []},
    },
}  # fmt: skip


def _document(bench: Bench, form: str) -> Path:
    (bench.folder / "transcode-manifest.json").unlink()
    return bench.folder / ARRAY / {"zarr": ".zarray", "zarr3": "zarr.json"}[form]


def _enter() -> None:
    for form, cases in FIELDS.items():
        for word, fields in cases.items():

            def build(bench: Bench, form: str = form, fields: dict[str, Any] = fields) -> None:
                path = _document(bench, form)
                path.write_text(json.dumps(json.loads(path.read_text()) | fields))

            build.__name__, build.__doc__ = f"{form}_{word}", f"The description of an array: {word.replace('_', ' ')}."
            attack("reject", form, WORDS, ARRAY)(build)


_enter()


def _chunk(bench: Bench) -> Path:
    (bench.folder / "transcode-manifest.json").unlink()
    return bench.folder / ARRAY / "0.0"


@attack("reject", "zarr", WORDS, "no such file")
def zarr_missing_chunk(bench: Bench) -> None:
    """A chunk that is missing, which zarr fills in."""
    _chunk(bench).unlink()


@attack("reject", "zarr", WORDS, "leads out")
def zarr_chunk_is_a_link(bench: Bench) -> None:
    """A chunk that is somebody's file."""
    path = _chunk(bench)
    size = path.stat().st_size
    path.unlink()
    (bench.outside / "bytes").write_bytes(bytes(size))
    path.symlink_to(bench.outside / "bytes")


@attack("reject", "zarr", WORDS, "link")
def zarr_folder_is_a_link(bench: Bench) -> None:
    """A whole array that lies elsewhere."""
    _chunk(bench)
    (bench.folder / ARRAY).rename(bench.outside / "array")
    (bench.folder / ARRAY).symlink_to(bench.outside / "array")


@attack("reject", "zarr", WORDS, "regular")
def zarr_chunk_is_a_pipe(bench: Bench) -> None:
    """A pipe that nobody writes to."""
    path = _chunk(bench)
    path.unlink()
    os.mkfifo(path)


@attack("reject", "zarr3", WORDS, "checksum|chunk")
def zarr3_index_points_nowhere(bench: Bench) -> None:
    """An index whose entry lies beyond the file, with a wrong checksum."""
    (bench.folder / "transcode-manifest.json").unlink()
    path = bench.folder / ARRAY / "c" / "0" / "0"
    path.write_bytes(path.read_bytes()[:-20] + struct.pack("<QQI", 1 << 60, 64, 0))


@attack("ok", "zarr", "mcore2hf")
def zarr_objects_are_programs(bench: Bench) -> None:
    """Every `_extra_state` is a pickle that runs a command: none is opened."""
    (bench.folder / "transcode-manifest.json").unlink()
    for path in bench.folder.glob("*/shard_*.pt"):
        path.write_bytes(GADGET)
