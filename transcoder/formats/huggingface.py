"""A Hugging Face model directory: shards, index, config and the side files that travel with the weights."""

from __future__ import annotations

import stat
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transcoder.codecs import Weights, weights_of
from transcoder.errors import Problem, refuse
from transcoder.formats.safetensors import INDEX_NAME, SINGLE_NAME, Shard, read_index, read_shard, stays_inside
from transcoder.hfconfig import read_config
from transcoder.spec import TensorSpec

SIDE_LIMIT, SIDE_TOTAL = 64 << 20, 256 << 20  # bytes of one side file, and of all
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
LEFT_OUT_PREFIXES = ("training_args", "optimizer", "scheduler.")


@dataclass(frozen=True)
class HfDirectory:
    """Everything that a model directory holds, before any payload byte is read."""

    path: Path
    config: dict[str, Any]
    shards: tuple[Shard, ...]
    index: bytes | None
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


def open_hf(path: Path, follow_links: bool = False) -> HfDirectory:
    """The directory, its headers validated and its index compared with them. Raises InputError."""
    if not path.is_dir():
        raise refuse("not-found", f"{path}: no such directory; give a Hugging Face model directory")
    config = read_config(path)
    names, index, weights = _shard_names(path)
    shards = tuple(read_shard(path / name, follow_links) for name in names)
    _check_names(shards, weights)
    files, warnings = side_files(path, set(names))
    return HfDirectory(path, config, shards, index, files, warnings, follow_links)


def _shard_names(path: Path) -> tuple[list[str], bytes | None, dict[str, str] | None]:
    if (path / INDEX_NAME).is_file():
        weights = read_index(path / INDEX_NAME)
        names = sorted(set(weights.values()))
        missing = [
            Problem(file=name, expected="a shard that the index names", found="no such file")
            for name in names
            if not (path / name).exists()
        ]
        if missing:
            raise refuse("missing-shard", "shards are missing: the download may be incomplete", missing)
        return names, (path / INDEX_NAME).read_bytes(), weights
    if (path / SINGLE_NAME).exists():
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
    kept, warnings, total = [], [], 0
    for file in _walk(path, path):
        name = str(file.relative_to(path))
        if name in shards or name == INDEX_NAME:
            continue
        reason = _why_left_out(file)
        total += 0 if reason else file.stat().st_size
        if reason or total > SIDE_TOTAL:
            warnings.append(f"{name} is left out: {reason or 'the side files are too large'}")
        else:
            kept.append(name)
            if name.endswith(".py"):
                warnings.append(f"{name} is copied as inert data; it is never run")
    return tuple(kept), tuple(warnings)


def _walk(root: Path, folder: Path) -> Iterator[Path]:
    for entry in sorted(folder.iterdir()):
        if entry.is_dir() and not entry.is_symlink():
            if not (folder == root and entry.name in LEFT_OUT_FOLDERS):
                yield from _walk(root, entry)
        else:
            yield entry


def _why_left_out(file: Path) -> str:
    if file.name.endswith(WEIGHT_SUFFIXES) or file.name.startswith(LEFT_OUT_PREFIXES):
        return "a weight or pickle file that the index does not name"
    try:
        real = file.resolve(strict=True)
        info = real.stat()
    except (FileNotFoundError, RuntimeError) as error:  # a link to nothing, or to itself
        return str(error)
    if file.is_symlink() and not stays_inside(file, real):
        return "a link that leads outside the model's directory"
    if not stat.S_ISREG(info.st_mode):
        return "not a regular file"
    return "larger than 64 MB" if info.st_size > SIDE_LIMIT else ""
