"""There and back in one pass: bands go through the plan's chunks in memory and are compared, or written out again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import numpy as np

from transcoder.chunks import Scratch
from transcoder.disk import write_all, write_file
from transcoder.engine import (
    Array,
    Payloads,
    TreeDigest,
    converted,
    gather,
    received,
    run_groups,
    scatter,
    sent,
)
from transcoder.errors import DifferenceError, Problem
from transcoder.exporting import flush, shard_files
from transcoder.formats.safetensors import INDEX_NAME
from transcoder.importing import ImportPlan
from transcoder.kernels.casts import finite
from transcoder.mapped import side_file
from transcoder.movers import check_aliases
from transcoder.progress import Tally
from transcoder.spec import TensorSpec
from transcoder.turned import strokes
from transcoder.work import Work

Store = Callable[[TensorSpec, int, Array], None]  # stored tensor, first flat element, the elements that came back


def through_memory(plan: ImportPlan, workers: int, tally: Tally, store: Store | None = None) -> None:
    """Scatter every band into chunks, gather it again and compare the bits. Raises DifferenceError.

    Every copy of the plan is carried out in both directions, every band on its own, so memory stays bounded.
    """
    payloads, digests = Payloads(plan.source), dict[str, str]()
    catalog = plan.source.weights.catalog
    names = sorted(plan.model.hf, key=lambda name: (catalog[name].chunks[0].file, catalog[name].chunks[0].offset))

    def job(name: str) -> None:
        digests[name] = _there_and_back(plan, name, payloads, tally, store)

    jobs: list[Callable[[], None]] = [partial(job, name) for name in names]
    run_groups([jobs[i::workers] for i in range(workers)], workers, tally.stop)
    check_aliases(plan.model, digests)


def _there_and_back(plan: ImportPlan, name: str, payloads: Payloads, tally: Tally, store: Store | None) -> str:
    """One weight, band by band. Returns its digest."""
    tensor, spec = plan.model.hf[name], plan.source.weights.catalog[name]
    target = tensor.family.dtype(plan.dtype)
    tree, odd = TreeDigest(tensor.shape, target), False
    moves = list(payloads.bands(name))
    if name not in payloads.weights.codecs:
        moves = strokes(plan.atlas, tensor, moves)
    for start, stop in moves:
        band, scratch = payloads.read(name, start, stop), Scratch()
        values = converted(band, spec.dtype, target)
        tree.add(values)
        odd |= not finite(band, spec.dtype.name)
        scatter(plan.atlas, tensor, start, sent(tensor, values, target), scratch.store)
        back = gather(plan.atlas, tensor, start, stop, target, scratch.fetch)
        back = converted(received(tensor, back, target, values), target, spec.dtype)
        for part, first, old, new in _stored(payloads, spec, start, stop, band, back):
            _same(part.name, first, old, new)
            if store is not None:
                store(part, first, new)
        tally.moved(payloads.weigh(name, start, stop))
    tally.finished(tensor, odd)
    return tree.text()


def _stored(
    payloads: Payloads, spec: TensorSpec, start: int, stop: int, band: Array, back: Array
) -> Iterator[tuple[TensorSpec, int, Array, Array]]:
    """What the files hold of a band and what they would hold after it: tensor, first element, before, after."""
    codec = payloads.weights.codecs.get(spec.name)
    if codec is None:
        yield spec, start, band, back
        return
    rows = start // spec.shape[-1], stop // spec.shape[-1]
    old = payloads.parts(codec, *rows)
    new = codec.encode(back, spec.dtype.name, old[1:])
    for part, (first, _), before, after in zip(codec.parts, codec.places(*rows), old, new, strict=True):
        yield part, first, before, after


def _same(name: str, first: int, before: Array, after: Array) -> None:
    if before.tobytes() != after.tobytes():
        message = f"elements {first} to {first + before.size} came back with other bits"
        raise DifferenceError(
            "the round trip is not the identity", kind="difference", problems=[Problem(tensor=name, message=message)]
        )


def into_files(plan: ImportPlan, work: Work, workers: int, tally: Tally) -> None:
    """The round trip into a Hugging Face directory, with no Megatron files between."""
    payloads = Payloads(plan.source)
    work.begin({shard.name: shard.size for shard in plan.source.shards})
    with shard_files(plan.source.shards, work.out) as files:

        def store(spec: TensorSpec, start: int, band: Array) -> None:
            chunk = spec.chunks[0]
            write_all(
                files[chunk.file], np.ascontiguousarray(band).data.cast("B"), chunk.offset + start * spec.dtype.size
            )

        through_memory(plan, workers, tally, store)
        for name in plan.ignored:
            spec = plan.source.catalog[name]
            store(spec, 0, payloads.stored(spec, 0, prod(spec.shape)))
        if work.sync:
            flush(files)
    for name in plan.source.side_files:
        write_file(work.out / name, side_file(plan.source.path, name), work.sync)
    if plan.source.index is not None:
        write_file(work.out / INDEX_NAME, plan.source.index.data, work.sync)
