"""mcore2hf: the same rules read from right to left, into safetensors files whose every byte has its place first."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.checksums import SUMS, files_below, sums, text
from transcoder.disk import File, close, make_durable, sized, start_flush, write_all, write_file
from transcoder.errors import Problem, refuse
from transcoder.exportplan import ExportPlan
from transcoder.formats.safetensors import INDEX_NAME, Shard
from transcoder.mapped import side_file
from transcoder.megatron import Megatron
from transcoder.outgoing import changed, emitted
from transcoder.progress import Tally
from transcoder.spec import TensorSpec

if TYPE_CHECKING:
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import Fetch
    from transcoder.kept import Kept
    from transcoder.ledger import Ledger
    from transcoder.merging import Merger
    from transcoder.work import Work


def export_identity(plan: ExportPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes this run the same as another one."""
    from transcoder.identity import identity

    source = plan.source
    files = [source.path / name for name in source.everything]
    if source.reference is not None:
        files += [source.reference / name for name in plan.side_files]
    if source.original is not None:
        files += [source.original.path / shard.name for shard in source.original.shards]
    files += plan.merge.files
    decided = [plan.index or b"", *(shard.name.encode() + shard.header for shard in plan.shards)]
    return identity("mcore2hf", options, dict.fromkeys(files), decided)


def run_export(plan: ExportPlan, work: Work, *, workers: int, tally: Tally, checksums: str = "") -> list[str]:
    """Write the whole directory, or what an earlier run left of it. Returns warnings. Raises InputError on damage."""
    work.begin({shard.name: shard.size for shard in plan.shards})
    for name, data in _side_files(plan):
        write_file(work.out / name, changed(data, plan.changes) if name == "config.json" else data, work.sync)
    warnings = stream_export(plan, work, workers, tally)
    if plan.index is not None:
        write_file(work.out / INDEX_NAME, plan.index, work.sync)
    if checksums:
        write_file(work.out / SUMS, text(sums(work.out, files_below(work.out), workers)), work.sync)
    return warnings


def _implied(plan: ExportPlan) -> Iterator[str]:
    source = plan.source
    if source.reference is None and not plan.made:
        yield "config.json follows from Megatron's own configuration: what that does not say is left out"
        if not source.model.sizes["pad"]:
            yield f"vocab_size is {source.model.sizes['vocab']}, all rows of the embedding: some may be padding"


def _side_files(plan: ExportPlan) -> Iterator[tuple[str, bytes]]:
    yield from plan.made.items()
    reference = plan.source.reference
    if reference is not None:
        yield from ((name, side_file(reference, name)) for name in plan.side_files)
    elif not plan.made:
        yield "config.json", emitted(plan.source.config)


def stream_export(plan: ExportPlan, work: Work, workers: int, tally: Tally) -> list[str]:
    """Move every payload byte into the shards; check checksums, digests and filler on the way. Returns warnings."""
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import run_groups
    from transcoder.kept import Kept, copy_kept, encode_weight
    from transcoder.ledger import Ledger
    from transcoder.maps import Maps
    from transcoder.merging import Merger

    source, merger = plan.source, Merger(plan.merge)
    chunks, kept = CheckedChunks(Maps(source.path).__getitem__), Kept(source)
    warnings = [*plan.warnings, *_implied(plan)]
    with shard_files(plan.shards, work.out) as files:
        ledger = Ledger(work.journal, partial(flush, files) if work.sync else None)
        ledger.restore(source.store.catalog, chunks.passed)
        groups: dict[str, list[Callable[[], None]]] = {shard.name: [] for shard in plan.shards}
        for name, spec in sorted(plan.weights.catalog.items(), key=lambda item: item[1].chunks[0].offset):
            job = partial(encode_weight, plan, name, merger, files, chunks, kept, ledger, warnings)
            if name not in source.model.hf:
                job = partial(copy_kept, spec, files, kept)
            elif name not in plan.weights.codecs:
                job = partial(_move, plan, spec, merger, files[spec.chunks[0].file], chunks, kept, ledger, work.sync)
            groups[spec.chunks[0].file].append(partial(job, tally))
        run_groups(groups.values(), workers, tally.stop)
        warnings += check_filler(source, chunks.fetch)
        chunks.finish()
        ledger.sync()
    return sorted([*warnings, *tally.warnings()])


def flush(files: Mapping[str, File]) -> None:
    """Make everything written to these files durable. Raises OSError."""
    for file in files.values():
        make_durable(file)


@contextmanager
def shard_files(shards: Iterable[Shard], folder: Path) -> Iterator[dict[str, File]]:
    """Open files of the final size with their headers written, by name."""
    files: dict[str, File] = {}
    try:
        for shard in shards:
            files[shard.name] = sized(folder / shard.name, shard.size)
            write_all(files[shard.name], memoryview(shard.header), 0)
        yield files
    finally:
        for file in files.values():
            close(file)


def _move(
    plan: ExportPlan,
    spec: TensorSpec,
    merger: Merger,
    file: File,
    chunks: CheckedChunks,
    kept: Kept,
    ledger: Ledger,
    flush: bool,
    tally: Tally,
) -> None:
    """Collect one tensor from its chunks into its place in a shard; compare its digest with the manifest's."""
    from transcoder.engine import bands, received
    from transcoder.kernels.casts import finite
    from transcoder.ledger import Track
    from transcoder.turned import collected, strokes

    source, place = plan.source, spec.chunks[0]
    tensor = source.model.hf[spec.name]
    stored = source.stored(tensor)
    track = Track(ledger, tensor.name, tensor.shape, stored)
    fetch = chunks.reader(tensor, track.parts)
    found = strokes(source.atlas, tensor, bands(tensor.shape, stored))
    todo = iter([stroke for stroke in found if stroke[1] > track.stop])
    coming = 0
    for start, stop in found:
        if stop > track.stop:
            while coming < 2 and (stroke := next(todo, None)):  # this one and the next
                chunks.ahead(source.atlas.pieces(tensor, *stroke), stored.size)
                coming += 1
            coming -= 1
            begin = place.offset + start * spec.dtype.size
            for first, band in collected(source.atlas, tensor, (start, stop), stored, fetch, begin, spec.dtype.size):
                values = received(tensor, band, stored, kept.values(tensor, stored, first, first + band.size))
                track.tree.add(values)
                track.count("odd", not finite(values, stored.name))
                data = merger.converted(tensor, first, values, stored, spec.dtype).data.cast("B")
                offset = place.offset + first * spec.dtype.size
                write_all(file, data, offset)
                if flush:
                    start_flush(file, offset, len(data))
            track.reach(stop)
        tally.moved((stop - start) * spec.dtype.size)
    check_digest(plan, spec.name, track.tree.text())
    tally.finished(tensor, odd=bool(track.counts.get("odd")))


def check_digest(plan: ExportPlan, name: str, found: str) -> None:
    """Refuse a tensor whose digest is not the manifest's. Raises InputError."""
    expected = plan.digests.get(name, found)
    if expected != found:
        hint = "the checkpoint was changed after it was written"
        problem = Problem(tensor=name, expected=expected, found=found, hint=hint)
        raise refuse("digest", "a tensor does not have the digest of the manifest", [problem])


def check_filler(source: Megatron, fetch: Fetch) -> list[str]:
    """Warn of padding rows that are not zero; refuse a bias that Hugging Face cannot hold and that is not zero."""
    from transcoder.fillers import holds_values

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
