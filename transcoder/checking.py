"""Whether a checkpoint is whole: headers, coverage, checksums, the manifest's digests. No model is needed."""

from __future__ import annotations

import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from isal.isal_zlib import crc32, crc32_combine

from transcoder import checksums, manifest
from transcoder.errors import DifferenceError, InputError, Problem
from transcoder.formats.huggingface import is_hf, open_hf
from transcoder.formats.opening import open_store
from transcoder.formats.peft import is_peft
from transcoder.formats.store import Store
from transcoder.iterations import current_rows, find_iteration, notes
from transcoder.original import kept_headers, kept_index
from transcoder.paths import Extent, extent, passing
from transcoder.progress import Listener, Progress
from transcoder.spec import Chunk

PIECE = 1 << 20  # bytes of one read
WORKERS = min(4, os.cpu_count() or 1)
NOT_DAMAGE = ("not-found", "no-checkpoint", "no-config", "architecture")  # the user named something else


def check(
    directory: Path, quick: bool, sample: float, listener: Listener | None = None, follow_links: bool = False
) -> dict[str, Any]:
    """A report of what was checked. Raises DifferenceError listing all damage, InputError when it is no checkpoint.

    quick: read no payloads. sample: percentage of the payloads to read.
    """
    try:
        if is_hf(directory):
            return _check_hf(directory, 0.0 if quick else sample, follow_links)
        report = _check_megatron(find_iteration(directory), 0.0 if quick else sample, listener)
        return report | {"warnings": [*notes(directory), *report["warnings"]]}
    except InputError as error:
        if error.kind in NOT_DAMAGE:
            raise
        raise DifferenceError(str(error.args[0]), kind=error.kind, problems=error.problems) from error


def _check_hf(directory: Path, sample: float, follow_links: bool) -> dict[str, Any]:
    source = open_hf(directory, follow_links)
    listed = checksums.read(directory)
    if sample >= 100 and (problems := list(checksums.changed(directory, listed, WORKERS))):
        raise DifferenceError(f"{directory} is damaged", kind="damage", problems=problems)
    _ = source.weights  # raises InputError for quantised weights that lack their scales
    parts = sum(shard.size for shard in source.shards)
    return {
        "source": str(directory),
        "format": "peft" if is_peft(directory) else "safetensors",
        "tensors": len(source.catalog),
        "bytes_read": sum(len(shard.header) for shard in source.shards),
        "checked": {"files": len(source.shards), "bytes": parts, "checksums": 0, "digests": len(listed)},
        "warnings": [] if listed else ["safetensors files carry no checksums: headers, index and sizes were checked"],
    }


def _check_megatron(folder: Path, sample: float, listener: Listener | None) -> dict[str, Any]:
    store = open_store(folder)
    table = manifest.read(folder)
    if table:  # what would be restored: raises InputError when it is damaged
        kept_headers(table)
        kept_index(table)
    rows = {row["name"]: row for row in current_rows(folder, table)}
    unproved = [] if rows else [f"no {manifest.NAME}: only what the format itself records was checked"]
    chunks = _by_file(store)
    problems = list(manifest.changed_files(folder, rows.values()))
    chunks |= {name: [] for name, row in rows.items() if row["digest"].startswith("crc32") and name not in chunks}
    total, done, counted = sum(c.nbytes for parts in chunks.values() for _, c in parts), 0, 0
    for number, (name, parts) in enumerate(sorted(chunks.items())):
        if sample and (folder / name).is_file():
            found, read = _check_payloads(folder, name, parts, rows.get(name), sample)
            problems += found
            counted += read
        done += sum(chunk.nbytes for _, chunk in parts)
        if listener is not None:
            listener(Progress(done, total, number + 1, len(chunks)))
    if sample >= 100 and not problems:
        hashes = {name: row["sha256"] for name, row in rows.items() if "sha256" in row}
        problems += checksums.changed(folder, hashes, WORKERS)
    if problems:
        raise DifferenceError(f"{folder} is damaged", kind="damage", problems=problems)
    return {
        "source": str(folder),
        "format": store.form,
        "tensors": len(store.tensors),
        "bytes_read": total if sample else 0,
        "checked": {"files": len(chunks), "bytes": total, "checksums": counted, "digests": len(rows)},
        "warnings": [*store.warnings, *unproved],
    }


def _by_file(store: Store) -> dict[str, list[tuple[str, Chunk]]]:
    found = dict[str, list[tuple[str, Chunk]]]()
    for key, spec in store.catalog.items():
        for chunk in spec.chunks:
            found.setdefault(chunk.file, []).append((key, chunk))
    return found


def _check_payloads(
    folder: Path, name: str, parts: list[tuple[str, Chunk]], row: Mapping[str, Any] | None, sample: float
) -> tuple[list[Problem], int]:
    """Compare the checksum of every sampled payload and, when all were read, that of the whole file."""
    view, problems, whole, place, count = extent(folder / name, root=folder), [], 0, 0, 0
    for key, chunk in sorted(parts, key=lambda part: part[1].offset):
        if not _sampled(key, chunk, sample):
            continue
        found = _crc(view, chunk.offset, chunk.offset + chunk.nbytes)
        whole = crc32_combine(_crc(view, place, chunk.offset, whole), found, chunk.nbytes)
        place, count = chunk.offset + chunk.nbytes, count + 1
        if chunk.crc is not None and found != chunk.crc:
            expected = f"CRC-32 {chunk.crc:08x}"
            problems.append(Problem(file=name, tensor=key, expected=expected, found=f"{found:08x}"))
    whole = _crc(view, place, len(view), whole)
    if row is not None and sample >= 100 and not problems and f"crc32:{whole:08x}" != row["digest"]:
        problems.append(Problem(file=name, expected=row["digest"], found=f"crc32:{whole:08x}"))
    return problems, count


def _sampled(key: str, chunk: Chunk, sample: float) -> bool:
    return sample >= 100 or zlib.crc32(repr((key, chunk.box)).encode()) % 10000 < sample * 100


def _crc(view: Extent, start: int, stop: int, value: int = 0) -> int:
    for piece in passing(view, start, stop, PIECE):
        value = crc32(piece, value)
    return value
