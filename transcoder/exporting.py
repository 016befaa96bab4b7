"""mcore2hf: the same rules read from right to left, into safetensors files whose every byte has its place first."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder import manifest
from transcoder.checks import ignored_names
from transcoder.codecs import Weights, weights_of
from transcoder.errors import Problem, UsageError, refuse
from transcoder.formats.safetensors import INDEX_NAME, SINGLE_NAME, Shard, emit_header, plain_name, shard_tensors
from transcoder.formats.torch_dist import map_file
from transcoder.hfconfig import read_config
from transcoder.kept import kept_shards
from transcoder.megatron import Megatron
from transcoder.outgoing import changed, config_changes
from transcoder.paths import write_file
from transcoder.progress import Tally
from transcoder.spec import DTYPES, DType, TensorSpec

if TYPE_CHECKING:
    from transcoder.engine import CheckedChunks, Fetch
    from transcoder.kept import Kept


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


def plan_export(
    source: Megatron, *, dtype: str = "", max_shard: int = 5_000_000_000, quantised: bool = False
) -> ExportPlan:
    """Where every exported tensor goes: the original shards if known, else shards of at most `max_shard` bytes.

    quantised: write weights as small numbers with scales where the original does. Raises InputError.
    """
    if max_shard < 1:
        raise UsageError("--max-shard-size: give a size of 1 byte or more", kind="size")
    target = DTYPES[dtype] if dtype else source.dtype
    config = read_config(source.reference)
    shards, index, weights = _known(source, config)
    if quantised and not weights.codecs:
        hint = "give --hf-model with the quantised original"
        raise refuse("quantised", f"no quantised original is known: {hint}", [Problem(file=str(source.path))])
    fits = _fits(source, weights, target)
    if quantised and not fits:
        raise refuse("quantised", "the original's tensors are not those of this checkpoint")
    changes: dict[str, Any] = {}
    if not fits or (weights.codecs and not quantised):
        shards, index = _fresh(source, target, max_shard)
        weights = weights_of(_catalog(shards), {})
        changes = config_changes(source, config, target)
    side_files = tuple(sorted(_files_below(source.reference)))
    rows = (source.manifest or {}).get("tensors", [])
    digests = {row["name"]: row["tree"] for row in rows}
    return ExportPlan(source, shards, index, side_files, target, digests, weights, changes)


def _catalog(shards: Iterable[Shard]) -> dict[str, TensorSpec]:
    return {spec.name: spec for shard in shards for spec in shard.tensors}


def _known(source: Megatron, config: Mapping[str, Any]) -> tuple[tuple[Shard, ...], bytes | None, Weights]:
    """The original's shards, index file and weights; nothing where none is known."""
    if source.original is not None:
        original = source.original
        return original.shards, original.index, original.weights
    if source.manifest is None:
        return (), None, Weights({}, {})
    restore = source.manifest["restore"]
    sizes = {row["name"]: row["size"] for row in source.manifest["source"]["files"]}
    shards = tuple(_shard_of(name, manifest.unpack(text), sizes[name]) for name, text in restore["headers"].items())
    index = manifest.unpack(restore["index"]) if restore["index"] else None
    return shards, index, weights_of(_catalog(shards), config)


def _shard_of(name: str, header: bytes, size: int) -> Shard:
    if not plain_name(name):
        raise refuse("manifest", "a shard's name is not a plain file name", [Problem(file=name)])
    return Shard(name, size, header, shard_tensors(name, header, size))


def _fits(source: Megatron, weights: Weights, dtype: DType) -> bool:
    """Whether these weights are exactly the model's in this dtype, and those that were kept beside it."""
    wanted, unneeded = source.model.hf, ignored_names(source.model, weights.catalog)
    found = {name: spec for name, spec in weights.catalog.items() if name not in unneeded}
    kept = {spec.name for shard in kept_shards(source)[1] for spec in shard.tensors} if unneeded else set()
    return (
        unneeded <= kept
        and found.keys() == wanted.keys()
        and all(
            spec.shape == wanted[name].shape and wanted[name].family.accepts(spec.dtype, dtype)
            for name, spec in found.items()
        )
    )


def _fresh(source: Megatron, dtype: DType, max_shard: int) -> tuple[tuple[Shard, ...], bytes | None]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in source.model.hf.items():
        nbytes = prod(tensor.shape) * tensor.family.dtype(dtype).size
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


def _shard(source: Megatron, file: str, names: list[str], dtype: DType) -> Shard:
    chosen = {name: source.model.hf[name] for name in names}
    tensors = [(name, tensor.family.dtype(dtype), tensor.shape) for name, tensor in chosen.items()]
    header = emit_header(tensors, {"format": "pt"})
    size = len(header) + sum(prod(shape) * each.size for _, each, shape in tensors)
    return Shard(file, size, header, shard_tensors(file, header, size))


def _index(shards: tuple[Shard, ...]) -> bytes:
    weights = {spec.name: shard.name for shard in shards for spec in shard.tensors}
    total = sum(spec.nbytes for shard in shards for spec in shard.tensors)
    return (
        json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}, indent=2) + "\n"
    ).encode()


def _files_below(folder: Path) -> list[str]:
    """Side files of the reference directory: every plain file that is neither weights nor an index."""
    from transcoder.formats.huggingface import side_files

    shards = {path.name for path in folder.glob("*.safetensors")}
    return list(side_files(folder, shards)[0])


def stale_weights(folder: Path) -> set[str]:
    """Weight files of an earlier model in `folder` that would shadow or outlive the new ones."""
    from transcoder.formats.safetensors import read_index

    index = folder / INDEX_NAME
    named = set(read_index(index).values()) if index.is_file() else set()
    return {name for name in (*named, INDEX_NAME, SINGLE_NAME) if plain_name(name) and (folder / name).is_file()}


def run_export(plan: ExportPlan, work: Path, *, workers: int, sync: bool, tally: Tally) -> list[str]:
    """Write the whole directory into the folder `work`. Returns warnings. Raises InputError on damage."""
    for name in plan.side_files:
        data = (plan.source.reference / name).read_bytes()
        write_file(work / name, changed(data, plan.changes) if name == "config.json" else data, sync)
    warnings = stream_export(plan, work, workers, sync, tally)
    if plan.index is not None:
        write_file(work / INDEX_NAME, plan.index, sync)
    return warnings


def stream_export(plan: ExportPlan, work: Path, workers: int, sync: bool, tally: Tally) -> list[str]:
    """Move every payload byte into the shards; check checksums, digests and filler on the way. Returns warnings."""
    from transcoder.engine import CheckedChunks, run_groups
    from transcoder.kept import Kept, copy_kept, encode_weight

    source = plan.source
    views = {name: map_file(source.path / name) for name in source.files}
    chunks, kept, warnings = CheckedChunks(views.__getitem__), Kept(source), list[str]()
    with shard_files(plan.shards, work, sync) as files:
        groups: dict[str, list[Callable[[], None]]] = {shard.name: [] for shard in plan.shards}
        for name, spec in sorted(plan.weights.catalog.items(), key=lambda item: item[1].chunks[0].offset):
            job = partial(encode_weight, plan, name, files, chunks, kept, warnings)
            if name not in source.model.hf:
                job = partial(copy_kept, spec, files, kept)
            elif name not in plan.weights.codecs:
                job = partial(_move, plan, spec, files[spec.chunks[0].file], chunks, kept, sync)
            groups[spec.chunks[0].file].append(partial(job, tally))
        run_groups(groups.values(), workers)
        warnings += check_filler(source, chunks.fetch)
        chunks.finish()
    return warnings


@contextmanager
def shard_files(shards: Iterable[Shard], work: Path, sync: bool) -> Iterator[dict[str, int]]:
    """Open files of the final size with their headers written, by name; durable at the end if `sync`."""
    files: dict[str, int] = {}
    try:
        for shard in shards:
            files[shard.name] = _create(work / shard.name, shard)
        yield files
        for file in files.values():
            if sync:
                os.fdatasync(file)
    finally:
        for file in files.values():
            os.close(file)


def _move(
    plan: ExportPlan, spec: TensorSpec, file: int, chunks: CheckedChunks, kept: Kept, flush: bool, tally: Tally
) -> None:
    """Collect one tensor from its chunks into its place in a shard; compare its digest with the manifest's."""
    from transcoder.engine import TreeDigest, bands, converted, gather_for, received
    from transcoder.formats.torch_dist_writer import start_flush, write_all

    source, place = plan.source, spec.chunks[0]
    tensor = source.model.hf[spec.name]
    stored = source.stored(tensor)
    tree, fetch = TreeDigest(tensor.shape, stored), chunks.reader(tensor)
    for start, stop in bands(tensor.shape, stored):
        offset = place.offset + start * spec.dtype.size
        band = gather_for(offset, source.atlas, tensor, start, stop, stored, fetch)
        band = received(tensor, band, stored, kept.values(tensor, stored, start, stop))
        tree.add(band)
        data = converted(band, stored, spec.dtype).data.cast("B")
        write_all(file, data, offset)
        if flush:
            start_flush(file, offset, len(data))
        tally.moved(len(data))
    check_digest(plan, spec.name, tree.text())
    tally.finished(tensor)


def check_digest(plan: ExportPlan, name: str, found: str) -> None:
    """Refuse a tensor whose digest is not the manifest's. Raises InputError."""
    expected = plan.digests.get(name, found)
    if expected != found:
        hint = "the checkpoint was changed after it was written"
        problem = Problem(tensor=name, expected=expected, found=found, hint=hint)
        raise refuse("digest", "a tensor does not have the digest of the manifest", [problem])


def _create(path: Path, shard: Shard) -> int:
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
    os.posix_fallocate(file, 0, shard.size)
    os.pwrite(file, shard.header, 0)
    return file


def check_filler(source: Megatron, fetch: Fetch) -> list[str]:
    """Warn of padding rows that are not zero; refuse a bias that Hugging Face cannot hold and that is not zero."""
    from transcoder.engine import holds_values

    padded: set[str] = set()
    problems = []
    for _, filler in source.model.fillers():
        if holds_values(source.atlas, filler, source.store.tensors[filler.key][0], fetch):
            if filler.cell.filler.startswith("zero"):
                expected = "zeros: the Hugging Face model has no such tensor"
                problems.append(Problem(tensor=filler.key, rule=filler.rule, expected=expected, found="other values"))
            else:
                padded.add(filler.key)
    if problems:
        raise refuse("filler", "the Megatron model holds values that the Hugging Face model cannot", problems)
    return [f"{key}: padding rows are not zero and are dropped" for key in sorted(padded)]
