"""A Hugging Face model directory: shards, index, config and the side files that travel with the weights."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transcoder.codecs import Weights, weights_of
from transcoder.disk import there
from transcoder.errors import LISTED_PROBLEMS, Problem, reason, refuse
from transcoder.formats.peft import WEIGHTS, is_peft, open_peft
from transcoder.formats.safetensors import (
    INDEX_LIMIT,
    INDEX_NAME,
    SINGLE_NAME,
    Packed,
    Shard,
    packed,
    read_shard,
    weight_map,
)
from transcoder.hfconfig import raw_json, read_config
from transcoder.paths import length, open_regular
from transcoder.spec import TensorSpec

SIDE_LIMIT, SIDE_TOTAL = 64 << 20, 256 << 20  # bytes of one side file, and of all
ABSENT = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO)  # of links to nothing, and sockets
LEFT_OUT_FOLDERS = (".git", ".cache", "original")
WEIGHT_SUFFIXES = (
    ".safetensors",
    ".bin",
    ".gguf",
    ".pt",
    ".pth",
    ".pkl",
    ".ckpt",
    ".npy",
    ".npz",
    ".h5",
    ".msgpack",
    ".onnx",
)
ARCHIVE_SUFFIXES = (".zip", ".tar", ".gz", ".tgz", ".bz2", ".xz", ".zst", ".7z", ".rar")
# First bytes of pickles (protocols 2 to 5), zip, NumPy, GGUF, HDF5, gzip, bzip2, xz, zstd, 7z.
WEIGHT_STARTS: tuple[bytes, ...] = (b"\x80\2", b"\x80\3", b"\x80\4", b"\x80\5", b"PK\3\4", b"PK\5\6", b"\x93NUMPY")
WEIGHT_STARTS += (b"GGUF", b"\x89HDF", b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"7z\xbc\xaf")
LEFT_OUT_PREFIXES = ("training_args", "optimizer", "scheduler.")


@dataclass(frozen=True)
class HfDirectory:
    """Everything that a model directory holds, before any payload byte is read."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: Packed | None
    side_files: tuple[str, ...]
    warnings: tuple[str, ...]
    follow_links: bool = False  # whether shards may be links that lead out of the directory

    @cached_property
    def catalog(self) -> dict[str, TensorSpec]:
        """Every stored tensor by name."""
        return {spec.name: spec for shard in self.shards for spec in shard.tensors}

    @cached_property
    def weights(self) -> Weights:
        """What the tensors mean: quantised ones joined with their scales. Raises InputError when one lacks them."""
        return weights_of(self.catalog, self.config)


def is_hf(directory: Path) -> bool:
    """Whether the directory is a Hugging Face one, of a model or of an adapter, by its marker file."""
    return (there(directory / "config.json") or is_peft(directory)) and not there(directory / ".metadata")


def open_hf(path: Path, follow_links: bool = False) -> HfDirectory:
    """The directory, its headers validated and its index compared with them; an adapter's has no config of a model.

    Raises InputError.
    """
    if is_peft(path):
        files, warnings = side_files(path, {WEIGHTS})
        return HfDirectory(path, {}, (open_peft(path, follow_links).shard,), None, files, warnings, follow_links)
    if not path.is_dir():
        raise refuse("not-found", f"{path}: no such directory; give a Hugging Face model directory")
    config = read_config(path)
    names, index, weights = _shard_names(path)
    shards = tuple(read_shard(path / name, follow_links) for name in names)
    _check_names(shards, weights)
    files, warnings = side_files(path, set(names))
    return HfDirectory(path, config, shards, index, files, (*_remarks(path, config), *warnings), follow_links)


def _remarks(path: Path, config: Mapping[str, Any]) -> Iterator[str]:
    """What a user should know before the weights are looked at. Raises InputError for a config that makes no sense."""
    if not isinstance(config.get("quantization_config"), dict | None):
        problem = Problem(file="config.json", message="quantization_config", expected="an object")
        raise refuse("config", "the config does not describe a model", [problem])
    if config.get("auto_map"):
        yield "config.json asks for code of its own (auto_map); it is ignored"
    places = (path, path / ".cache" / "huggingface" / "download")
    halves = sorted(file.name for place in places if place.is_dir() for file in place.glob("*.incomplete"))
    if halves:
        yield f"{len(halves)} downloads into this directory are unfinished, {halves[0]} among them"


def _shard_names(path: Path) -> tuple[list[str], Packed | None, dict[str, str] | None]:
    if there(path / INDEX_NAME):
        index, table = raw_json(path / INDEX_NAME, INDEX_LIMIT)
        weights = weight_map(table, INDEX_NAME)
        names = sorted(set(weights.values()))
        missing = [
            Problem(file=name, expected="a shard that the index names", found="no such file")
            for name in names
            if not there(path / name)
        ]
        if missing:
            raise refuse("missing-shard", "shards are missing: the download may be incomplete", missing)
        return names, packed(index), weights
    if there(path / SINGLE_NAME):
        return [SINGLE_NAME], None, None
    problem = Problem(
        expected=f"{SINGLE_NAME} or {INDEX_NAME}", found=", ".join(sorted(p.name for p in path.iterdir())[:8])
    )
    raise refuse("no-weights", f"{path} holds no safetensors weights", [problem])


def _check_names(shards: tuple[Shard, ...], weights: dict[str, str] | None) -> None:
    problems, seen = [], dict[str, str]()
    for shard in shards:
        for spec in shard.tensors:
            if spec.name in seen:
                problems.append(
                    Problem(
                        file=shard.name, tensor=spec.name, message="stored twice", found=f"also in {seen[spec.name]}"
                    )
                )
            seen[spec.name] = shard.name
    for name, file in (weights or {}).items():
        if seen.get(name) != file:
            problems.append(
                Problem(file=INDEX_NAME, tensor=name, expected=f"in {file}", found=f"in {seen.get(name, 'no shard')}")
            )
    if weights is not None:
        problems += [
            Problem(file=file, tensor=name, message="not named by the index")
            for name, file in seen.items()
            if name not in weights
        ]
    if problems:
        raise refuse("index", "index and shards disagree", problems)


def side_files(path: Path, shards: set[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Names of the files that travel with the weights, and warnings about those that do not."""
    kept, code, left, total = [], [], [], 0
    for file in _walk(path, path):
        name = str(file.relative_to(path))
        if name in shards or name == INDEX_NAME:
            continue
        size, why = _judged(file, path)
        if not why and total + size > SIDE_TOTAL:
            why = "the side files are too large"
        if why:
            left.append(f"{name} is left out: {why}")
        else:
            total += size
            kept.append(name)
            code += [f"{name} is copied as inert data; it is never run"] if name.endswith(".py") else []
    return tuple(kept), (*_listed(code, "copied as inert data"), *_listed(left, "left out"))


def _listed(lines: list[str], what: str) -> list[str]:
    """The lines, or the first of them and a count."""
    rest = len(lines) - LISTED_PROBLEMS
    return lines if rest <= 0 else [*lines[:LISTED_PROBLEMS], f"… and {rest} more files are {what}"]


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if not _is_folder(entry):
            yield entry
        elif not (folder == root and entry.name in LEFT_OUT_FOLDERS):
            yield from _walk(root, entry)


def _is_folder(entry: Path) -> bool:
    """A folder that can be listed; a path may be too long."""
    if not isinstance(entry, Path):
        return entry.is_dir()
    try:
        return stat.S_ISDIR(entry.lstat().st_mode) and os.access(entry, os.R_OK | os.X_OK)
    except OSError:
        return False


def _judged(file: Path, root: Path) -> tuple[int, str]:
    """Bytes of a side file, and why it does not travel with the weights."""
    if file.name.lower().endswith(WEIGHT_SUFFIXES + ARCHIVE_SUFFIXES) or file.name.startswith(LEFT_OUT_PREFIXES):
        return 0, "a weight or pickle file that the index does not name"
    try:
        str(file).encode()
        with open_regular(file, root=root) as opened:
            size, start = length(opened), bytes(opened.read(8))
    except UnicodeEncodeError:
        return 0, "its name is not UTF-8"
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in ABSENT:
            raise
        return 0, reason(error)
    if start.startswith(WEIGHT_STARTS):
        return size, "it begins as a pickle, an archive or a weight file does"
    return size, "larger than 64 MB" if size > SIDE_LIMIT else ""
