"""What an export writes, decided from metadata alone: every shard with its header, the index, side files."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from transcoder.checks import ignored_names
from transcoder.codecs import Weights, weights_of
from transcoder.errors import InputError, Problem, UsageError, refuse
from transcoder.formats.foreign import PlainDcp
from transcoder.formats.safetensors import INDEX_NAME, SINGLE_NAME, Shard, emit_header, shard
from transcoder.kept import kept_shards
from transcoder.megatron import Megatron
from transcoder.outgoing import config_changes
from transcoder.paths import plain_name
from transcoder.planner import HfTensor
from transcoder.spec import DTYPES, DType


@dataclass(frozen=True)
class ExportPlan:
    """Every output file with its size, before a payload byte is read."""

    source: Megatron
    shards: tuple[Shard, ...]
    index: bytes | None
    side_files: tuple[str, ...]
    dtype: DType
    digests: dict[str, str]
    weights: Weights  # what the tensors of the shards mean
    changes: Mapping[str, Any]  # of config.json
    warnings: tuple[str, ...]


def plan_export(
    source: Megatron, *, dtype: str = "", max_shard: int = 5_000_000_000, quantised: bool = False
) -> ExportPlan:
    """Where every exported tensor goes: the original shards if known, else shards of at most `max_shard` bytes.

    quantised: write weights as small numbers with scales where the original does. Raises InputError.
    """
    if max_shard < 1:
        raise UsageError("--max-shard-size: give a size of 1 byte or more", kind="size")
    shards, weights = source.origin.shards, source.origin.weights
    index = source.origin.index.data if source.origin.index else None
    if quantised and not weights.codecs:
        hint = "give --hf-model with the quantised original"
        raise refuse("quantised", f"no quantised original is known: {hint}", [Problem(file=str(source.path))])
    usual = next((weights.catalog[name].dtype for name in weights.codecs), source.dtype) if quantised else source.dtype
    target = DTYPES[dtype] if dtype else usual
    misfits = list(_misfits(source, weights, target))
    if quantised and misfits:
        raise refuse("quantised", "the original's weights are not those of this checkpoint", misfits)
    changes: dict[str, Any] = {}
    if misfits or (weights.codecs and not quantised):
        shards, index = _fresh(source, target, max_shard)
        weights = weights_of({spec.name: spec for shard in shards for spec in shard.tensors}, {})
        changes = config_changes(source, source.config, target)
    side_files, warnings = files_below(source.reference) if source.reference else ((), ())
    return ExportPlan(source, shards, index, side_files, target, dict(_digests(source)), weights, changes, warnings)


def _digests(source: Megatron) -> Iterator[tuple[str, str]]:
    """Digests of the manifest, but for tensors that are now spelled as another variant than on import."""
    table = source.manifest or {}
    other = [name for name, choice in table.get("variants", {}).items() if source.model.values.get(name) != choice]
    for row in table.get("tensors", []):
        tensor = source.model.hf.get(row["name"])
        if tensor is not None and not any(re.search(rf"\b{name}\b", tensor.family.rule.only) for name in other):
            yield row["name"], row["tree"]


def _misfits(source: Megatron, weights: Weights, dtype: DType) -> Iterator[Problem]:
    """Why files of these weights cannot hold the model in this dtype, and what was kept beside it; at most one each."""
    wanted, unneeded = source.model.hf, ignored_names(source.model, weights.catalog)
    kept = {spec.name for shard in kept_shards(source)[1] for spec in shard.tensors} if unneeded else set()
    for name, spec in weights.catalog.items():
        if name not in wanted and name not in unneeded & kept:
            yield Problem(tensor=name, expected="a tensor of the original", found="none in the checkpoint")
        elif name in wanted and (
            spec.shape != wanted[name].shape or not wanted[name].family.accepts(spec.dtype, dtype)
        ):
            expected, found = f"{spec.dtype.name} {list(spec.shape)}", f"{dtype.name} {list(wanted[name].shape)}"
            yield Problem(tensor=name, expected=expected, found=found)
    for name in wanted.keys() - weights.catalog.keys():
        yield Problem(tensor=name, expected="nothing: the original lacks it", found="a tensor of the checkpoint")


def _fresh(source: Megatron, dtype: DType, max_shard: int) -> tuple[tuple[Shard, ...], bytes | None]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in source.model.hf.items():
        nbytes = prod(tensor.shape) * _dtype(source, tensor, dtype).size
        if groups[-1] and size + nbytes > max_shard:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += nbytes
    names = (
        [SINGLE_NAME]
        if len(groups) == 1
        else [f"model-{i + 1:05d}-of-{len(groups):05d}.safetensors" for i in range(len(groups))]
    )
    shards = tuple(_shard(source, name, group, dtype) for name, group in zip(names, groups, strict=True))
    return shards, _index(shards) if len(shards) > 1 else None


def _dtype(source: Megatron, tensor: HfTensor, dtype: DType) -> DType:
    """The original's dtype of a tensor that may have two, or that of another trainer's file, else its rule's."""
    known = source.origin.weights.catalog.get(tensor.name)
    if known is None and not isinstance(source.store, PlainDcp):
        return tensor.family.dtype(dtype)
    found = source.stored(tensor) if known is None else known.dtype
    return found if tensor.family.rule.dtype and tensor.family.accepts(found, dtype) else tensor.family.dtype(dtype)


def _shard(source: Megatron, file: str, names: list[str], dtype: DType) -> Shard:
    chosen = {name: source.model.hf[name] for name in names}
    tensors = [(name, _dtype(source, tensor, dtype), tensor.shape) for name, tensor in chosen.items()]
    header = emit_header(tensors, {"format": "pt"})
    size = len(header) + sum(prod(shape) * each.size for _, each, shape in tensors)
    return shard(file, header, size)


def _index(shards: tuple[Shard, ...]) -> bytes:
    weights = {spec.name: shard.name for shard in shards for spec in shard.tensors}
    total = sum(spec.nbytes for shard in shards for spec in shard.tensors)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}, indent=2) + "\n"
    ).encode()


def files_below(folder: Path) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Side files of the reference directory, which are neither weights nor an index; and what is left out of them."""
    from transcoder.formats.huggingface import side_files

    kept, warnings = side_files(folder, {path.name for path in folder.glob("*.safetensors")})
    return tuple(sorted(kept)), warnings


def stale_weights(folder: Path) -> set[str]:
    """Weight files of an earlier model in `folder` that would shadow or outlive the new ones. Raises OutputError."""
    from transcoder.disk import there
    from transcoder.formats.safetensors import read_index
    from transcoder.publishing import refused

    try:
        index = folder / INDEX_NAME
        named = set(read_index(index).values()) if there(index) else set()
        return {name for name in (*named, INDEX_NAME, SINGLE_NAME) if plain_name(name) and there(folder / name)}
    except (OSError, InputError) as error:
        raise refused(folder, str(error), "mend or remove it, or choose another destination") from error
