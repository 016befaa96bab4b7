"""There and back in one pass: bands go through the plan's chunks in memory and are compared, or written out again."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path

from transcoder.engine import Array, Payloads, Scratch, bands, converted, gather, run_groups, scatter
from transcoder.errors import DifferenceError, Problem
from transcoder.exporting import shard_files
from transcoder.formats.safetensors import INDEX_NAME
from transcoder.formats.torch_dist_writer import write_all
from transcoder.importing import ImportPlan
from transcoder.paths import write_file
from transcoder.progress import Tally
from transcoder.spec import TensorSpec

Store = Callable[[TensorSpec, int, Array], None]  # tensor, first flat element, the elements that came back


def through_memory(plan: ImportPlan, workers: int, tally: Tally, store: Store | None = None) -> None:
    """Scatter every band into chunks, gather it again and compare the bits. Raises DifferenceError.

    Every copy of the plan is carried out in both directions, every band on its own, so memory stays bounded.
    """
    payloads = Payloads(plan.source)
    specs = sorted(plan.source.catalog.values(), key=lambda spec: (spec.chunks[0].file, spec.chunks[0].offset))
    jobs: list[Callable[[], None]] = [
        partial(_there_and_back, plan, spec, payloads, tally, store) for spec in specs if spec.name in plan.model.hf
    ]
    run_groups([jobs[i::workers] for i in range(workers)], workers)


def _there_and_back(plan: ImportPlan, spec: TensorSpec, payloads: Payloads, tally: Tally, store: Store | None) -> None:
    tensor = plan.model.hf[spec.name]
    target = tensor.family.dtype(plan.dtype)
    for start, stop in bands(tensor.shape, spec.dtype):
        band = payloads.read(spec, start, stop)
        scratch = Scratch()
        scatter(plan.atlas, tensor, start, converted(band, spec.dtype, target), scratch.store)
        back = gather(plan.atlas, tensor, start, stop, target, scratch.fetch)
        back = converted(back, target, spec.dtype)
        if back.tobytes() != band.tobytes():
            problem = Problem(tensor=spec.name, message=f"elements {start} to {stop} came back with other bits")
            raise DifferenceError("the round trip is not the identity", kind="difference", problems=[problem])
        if store is not None:
            store(spec, start, back)
        tally.moved(band.nbytes)
    tally.finished(tensor)


def into_files(plan: ImportPlan, work: Path, workers: int, sync: bool, tally: Tally) -> None:
    """The round trip into a Hugging Face directory `work`, with no Megatron files between."""
    with shard_files(plan.source.shards, work, sync) as files:

        def store(spec: TensorSpec, start: int, band: Array) -> None:
            chunk = spec.chunks[0]
            write_all(files[chunk.file], band.data.cast("B"), chunk.offset + start * spec.dtype.size)

        through_memory(plan, workers, tally, store)
    for name in plan.source.side_files:
        write_file(work / name, (plan.source.path / name).read_bytes(), sync)
    if plan.source.index is not None:
        write_file(work / INDEX_NAME, plan.source.index, sync)
