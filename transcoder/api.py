"""The operations behind the commands and the Python API; each returns a report of plain values."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.errors import DifferenceError, Problem, UsageError
from transcoder.mesh import Mesh

if TYPE_CHECKING:
    from transcoder.importing import ImportPlan

Path_ = str | os.PathLike[str]
Progress = Callable[[int, int], None]  # bytes done, bytes in all
SMALLEST_MEMORY = 16 << 20  # bytes: two bands and their conversions for one worker


def _nothing(done: int, total: int) -> None:
    """The default progress callback."""


def hf2mcore(
    src: Path_,
    dst: Path_,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    layout: str = "",
    dtype: str = "",
    make_vocab_size_divisible_by: int = 128,
    iteration: int | str = "both",
    workers: int = 0,
    memory: int = 64 << 20,
    sync: bool = True,
    overwrite: bool = False,
    follow_links: bool = False,
    progress: Progress = _nothing,
) -> dict[str, Any]:
    """Convert a Hugging Face directory to a Megatron checkpoint. Returns the report; raises TranscoderError."""
    from transcoder.importing import run_import
    from transcoder.paths import destination

    started = time.monotonic()
    plan = plan_hf2mcore(
        src,
        Mesh(tp, pp, ep, etp),
        layout=layout,
        dtype=dtype,
        divisor=make_vocab_size_divisible_by,
        iteration=iteration,
        follow_links=follow_links,
    )
    total = sum(spec.nbytes for spec in plan.source.catalog.values())
    with destination(Path(dst), Path(src), overwrite) as work:
        run_import(plan, work, workers=worker_count(workers, memory), sync=sync, progress=_counter(progress, total))
    return import_report(plan, str(dst)) | _costs(started, total, sum(plan.placement.sizes.values()))


def plan_hf2mcore(src: Path_, mesh: Mesh, **options: Any) -> ImportPlan:
    """The plan of an import, from headers and config alone."""
    from transcoder.importing import plan_import

    return plan_import(Path(src), mesh, **options)


def import_report(plan: ImportPlan, dst: str) -> dict[str, Any]:
    """What a plan says about itself, as plain values."""
    counts = [sum(_elements(tensor.shape) for tensor in plan.model.hf.values())]
    return {
        "source": str(plan.source.path),
        "destination": dst,
        "architecture": next(iter(plan.source.config.get("architectures") or [""])),
        "tensors": len(plan.model.hf),
        "parameters": counts[0],
        "warnings": list(plan.warnings),
        "weights_only": plan.model.weights_only(),
        "iteration": plan.step,
        "folder": plan.folder,
        "megatron_parameters": rank_parameters(plan),
        "parallel": {"tp": plan.mesh.tp, "pp": plan.mesh.pp, "ep": plan.mesh.ep, "etp": plan.mesh.etp},
    }


def _elements(shape: tuple[int, ...]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def rank_parameters(plan: ImportPlan) -> list[dict[str, int]]:
    """Parameters on every (tensor, pipeline) rank without vocabulary padding, as Megatron's model build counts them."""
    found = []
    for stage in range(plan.mesh.pp):
        for rank in range(plan.mesh.tp):
            count = sum(_on_rank(plan, name, stage, rank) for name in plan.model.mcore)
            found.append({"tp": rank, "pp": stage, "parameters": count})
    return found


def _on_rank(plan: ImportPlan, name: str, stage: int, rank: int) -> int:
    """Replicated tensors are stored by tensor rank 0 and counted on each."""
    mine, per_stage = stage * plan.mesh.stage_ranks + rank, plan.mesh.stage_ranks
    total = sharded = 0
    for chunk in plan.placement.catalog[name].chunks:
        owner = int(chunk.file[2:].split("_", 1)[0])
        size = chunk.nbytes // plan.dtype.size
        if owner // per_stage == stage:
            total += size
            sharded += size if owner == mine else 0
    tensor = plan.model.mcore[name]
    is_cut = any("tp" in node_mesh for node_mesh in _meshes(tensor.family.mcore[tensor.part].layout.text))
    if name.startswith(("embedding", "output_layer")):
        sharded -= plan.model.sizes["pad"] * plan.model.sizes["h"] // plan.mesh.tp if sharded else 0
    return sharded if is_cut else total


def _meshes(text: str) -> list[str]:
    return [part for part in text.replace(")", " ").replace("]", " ").split() if "/" in part]


def worker_count(workers: int, memory: int) -> int:
    """Workers that fit `memory` bytes of buffers. Raises UsageError when not even one does."""
    if memory < SMALLEST_MEMORY:
        raise UsageError(f"--memory: {memory} bytes are too few; give at least 16MiB", kind="memory")
    if workers < 0:
        raise UsageError("--workers: give a number of 1 or more", kind="workers")
    return max(1, min(workers or min(4, os.cpu_count() or 1), memory // SMALLEST_MEMORY))


def _counter(progress: Progress, total: int) -> Callable[[int], None]:
    done = 0

    def count(size: int) -> None:
        nonlocal done
        done += size
        progress(done, total)

    return count


def _costs(started: float, read: int, written: int) -> dict[str, Any]:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = round(time.monotonic() - started, 3)
    return {"bytes_read": read, "bytes_written": written, "seconds": seconds, "peak_memory": peak}


def mcore2hf(
    src: Path_,
    dst: Path_,
    *,
    hf_model: Path_ | None = None,
    arch: str = "",
    dtype: str = "",
    max_shard_size: int = 5_000_000_000,
    workers: int = 0,
    memory: int = 64 << 20,
    sync: bool = True,
    overwrite: bool = False,
    progress: Progress = _nothing,
) -> dict[str, Any]:
    """Convert a Megatron checkpoint to a Hugging Face directory. Returns the report; raises TranscoderError."""
    from transcoder.exporting import plan_export, run_export
    from transcoder.megatron import open_megatron
    from transcoder.paths import destination

    started = time.monotonic()
    reference = Path(hf_model) if hf_model else None
    megatron = open_megatron(Path(src), reference, arch)
    plan = plan_export(megatron, reference, dtype=dtype, max_shard=max_shard_size)
    total = sum(shard.size - len(shard.header) for shard in plan.shards)
    with destination(Path(dst), Path(src), overwrite) as work:
        warnings = run_export(plan, work, workers=worker_count(workers, memory), sync=sync, progress=_counter(progress, total))
    ignored = [f"{count} keys {prefix}* are training state and are ignored" for prefix, count in megatron.store.ignored.items()]
    return {
        "source": str(src),
        "destination": str(dst),
        "architecture": megatron.model.recipe.hf[0] if not arch else arch,
        "tensors": len(megatron.model.hf),
        "parameters": sum(_elements(tensor.shape) for tensor in megatron.model.hf.values()),
        "warnings": [*warnings, *ignored],
    } | _costs(started, total, total)


def stream_hf(path: Path_, hf_model: Path_ | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (Hugging Face name, array of raw elements) for each tensor of a checkpoint, one at a time.

    bfloat16 comes as uint16 bits. Raises InputError.
    """
    from transcoder.views import open_view

    view = open_view(Path(path), Path(hf_model) if hf_model else None)
    for name, (_, shape) in view.tensors.items():
        yield name, view.read(name, 0, _elements(shape)).reshape(shape)


def verify(one: Path_, two: Path_) -> dict[str, Any]:
    """Compare two checkpoints of any format tensor by tensor, bit for bit. Raises DifferenceError with the report."""
    from transcoder.views import compare, open_view

    views = open_view(Path(one), None), open_view(Path(two), None)
    differences = compare(*views)
    report = {"source": str(one), "destination": str(two), "tensors": len(views[0].tensors), "differences": differences}
    if differences:
        problems = [Problem(tensor=row["tensor"], message=_difference(row)) for row in differences]
        error = DifferenceError(f"{len(differences)} tensors differ", kind="difference", problems=problems)
        error.report = report  # type: ignore[attr-defined]
        raise error
    return report


def _difference(row: dict[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    return f"{row['count']} elements differ, first at {row['first_index']}, by at most {row['max_abs']}"


def inspect(directory: Path_) -> dict[str, Any]:
    """What a Megatron checkpoint holds, from its metadata. Raises InputError."""
    from transcoder.dialects import dialect_of
    from transcoder.formats.torch_dist import open_torch_dist
    from transcoder.megatron import find_iteration

    store = open_torch_dist(find_iteration(Path(directory)))
    keys = [
        {"key": key, "dtype": dtype.name, "shape": list(shape), "chunks": len(places)}
        for key, (dtype, shape, places) in sorted(store.tensors.items())
    ]
    parameters = sum(_elements(shape) for _, shape, _ in store.tensors.values())
    dialect = dialect_of(store.tensors)
    return {"source": str(directory), "tensors": len(keys), "parameters": parameters, "dialect": dialect, "keys": keys}
