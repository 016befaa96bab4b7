"""mcore2hf: the same rules read from right to left, into safetensors files whose every byte has its place first."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.checks import ignored_names
from transcoder.codecs import Weights, weights_of
from transcoder.disk import sized, start_flush, write_all, write_file
from transcoder.errors import Problem, UsageError, refuse
from transcoder.formats.safetensors import INDEX_NAME, SINGLE_NAME, Shard, emit_header, plain_name, shard_tensors
from transcoder.formats.torch_dist import map_file
from transcoder.kept import kept_shards
from transcoder.mapped import read_small
from transcoder.megatron import Megatron
from transcoder.outgoing import changed, config_changes, emitted
from transcoder.planner import HfTensor
from transcoder.progress import Tally
from transcoder.spec import DTYPES, DType, TensorSpec

if TYPE_CHECKING:
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import Fetch
    from transcoder.kept import Kept
    from transcoder.ledger import Ledger
    from transcoder.work import Work


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
    shards, index, weights = source.origin.shards, source.origin.index, source.origin.weights
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
    side_files = tuple(sorted(_files_below(source.reference))) if source.reference else ()
    return ExportPlan(source, shards, index, side_files, target, dict(_digests(source)), weights, changes)


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
    """The original's dtype of a tensor that may have two, else its rule's."""
    known = source.origin.weights.catalog.get(tensor.name)
    fits = known is not None and tensor.family.rule.dtype and tensor.family.accepts(known.dtype, dtype)
    return known.dtype if known is not None and fits else tensor.family.dtype(dtype)


def _shard(source: Megatron, file: str, names: list[str], dtype: DType) -> Shard:
    chosen = {name: source.model.hf[name] for name in names}
    tensors = [(name, _dtype(source, tensor, dtype), tensor.shape) for name, tensor in chosen.items()]
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


def export_identity(plan: ExportPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes this run the same as another one."""
    from transcoder.identity import identity

    source = plan.source
    files = [source.path / name for name in (".metadata", *source.files)]
    if source.reference is not None:
        files += [source.reference / name for name in plan.side_files]
    if source.original is not None:
        files += [source.original.path / shard.name for shard in source.original.shards]
    decided = [plan.index or b"", *(shard.name.encode() + shard.header for shard in plan.shards)]
    return identity("mcore2hf", options, dict.fromkeys(files), decided)


def run_export(plan: ExportPlan, work: Work, *, workers: int, tally: Tally) -> list[str]:
    """Write the whole directory, or what an earlier run left of it. Returns warnings. Raises InputError on damage."""
    work.begin({shard.name: shard.size for shard in plan.shards})
    for name, data in _side_files(plan):
        write_file(work.out / name, changed(data, plan.changes) if name == "config.json" else data, work.sync)
    warnings = stream_export(plan, work, workers, tally)
    if plan.index is not None:
        write_file(work.out / INDEX_NAME, plan.index, work.sync)
    return warnings


def _implied(source: Megatron) -> Iterator[str]:
    if source.reference is None:
        yield "config.json follows from Megatron's own configuration: what that does not say is left out"
        if not source.model.sizes["pad"]:
            yield f"vocab_size is {source.model.sizes['vocab']}, all rows of the embedding: some may be padding"


def _side_files(plan: ExportPlan) -> Iterator[tuple[str, bytes]]:
    if plan.source.reference is None:
        yield "config.json", emitted(plan.source.config)
        return
    for name in plan.side_files:
        yield name, read_small(plan.source.reference / name)


def stream_export(plan: ExportPlan, work: Work, workers: int, tally: Tally) -> list[str]:
    """Move every payload byte into the shards; check checksums, digests and filler on the way. Returns warnings."""
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import run_groups
    from transcoder.kept import Kept, copy_kept, encode_weight
    from transcoder.ledger import Ledger

    source = plan.source
    views = {name: map_file(source.path / name) for name in source.files}
    chunks, kept, warnings = CheckedChunks(views.__getitem__), Kept(source), list(_implied(source))
    with shard_files(plan.shards, work.out) as files:
        ledger = Ledger(work.journal, partial(flush, files) if work.sync else None)
        ledger.restore(source.store.catalog, chunks.passed)
        groups: dict[str, list[Callable[[], None]]] = {shard.name: [] for shard in plan.shards}
        for name, spec in sorted(plan.weights.catalog.items(), key=lambda item: item[1].chunks[0].offset):
            job = partial(encode_weight, plan, name, files, chunks, kept, ledger, warnings)
            if name not in source.model.hf:
                job = partial(copy_kept, spec, files, kept)
            elif name not in plan.weights.codecs:
                job = partial(_move, plan, spec, files[spec.chunks[0].file], chunks, kept, ledger, work.sync)
            groups[spec.chunks[0].file].append(partial(job, tally))
        run_groups(groups.values(), workers, tally.stop)
        warnings += check_filler(source, chunks.fetch)
        chunks.finish()
        ledger.sync()
    return sorted(warnings)


def flush(files: Mapping[str, int]) -> None:
    """Make everything written to these files durable. Raises OSError."""
    for file in files.values():
        os.fdatasync(file)


@contextmanager
def shard_files(shards: Iterable[Shard], folder: Path) -> Iterator[dict[str, int]]:
    """Open files of the final size with their headers written, by name."""
    files: dict[str, int] = {}
    try:
        for shard in shards:
            files[shard.name] = sized(folder / shard.name, shard.size)
            write_all(files[shard.name], memoryview(shard.header), 0)
        yield files
    finally:
        for file in files.values():
            os.close(file)


def _move(
    plan: ExportPlan,
    spec: TensorSpec,
    file: int,
    chunks: CheckedChunks,
    kept: Kept,
    ledger: Ledger,
    flush: bool,
    tally: Tally,
) -> None:
    """Collect one tensor from its chunks into its place in a shard; compare its digest with the manifest's."""
    from transcoder.engine import bands, converted, gather_for, received
    from transcoder.ledger import Track

    source, place = plan.source, spec.chunks[0]
    tensor = source.model.hf[spec.name]
    stored = source.stored(tensor)
    track = Track(ledger, tensor.name, tensor.shape, stored)
    fetch = chunks.reader(tensor, track.parts)
    for start, stop in bands(tensor.shape, stored):
        if stop > track.stop:
            offset = place.offset + start * spec.dtype.size
            band = gather_for(offset, source.atlas, tensor, start, stop, stored, fetch)
            band = received(tensor, band, stored, kept.values(tensor, stored, start, stop))
            track.tree.add(band)
            data = converted(band, stored, spec.dtype).data.cast("B")
            write_all(file, data, offset)
            if flush:
                start_flush(file, offset, len(data))
            track.reach(stop)
        tally.moved((stop - start) * spec.dtype.size)
    check_digest(plan, spec.name, track.tree.text())
    tally.finished(tensor)


def check_digest(plan: ExportPlan, name: str, found: str) -> None:
    """Refuse a tensor whose digest is not the manifest's. Raises InputError."""
    expected = plan.digests.get(name, found)
    if expected != found:
        hint = "the checkpoint was changed after it was written"
        problem = Problem(tensor=name, expected=expected, found=found, hint=hint)
        raise refuse("digest", "a tensor does not have the digest of the manifest", [problem])


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
