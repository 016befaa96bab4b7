"""The operations behind the commands and the Python API; each returns a report of plain values."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.errors import PathLike, UsageError
from transcoder.mesh import Mesh
from transcoder.progress import Listener, Tally
from transcoder.reading import verify, verify_export, verify_import

if TYPE_CHECKING:
    from transcoder.description import Plan
    from transcoder.exportplan import ExportPlan
    from transcoder.importing import ImportPlan

MEMORY = 64 << 20  # bytes of buffers
SMALLEST_MEMORY = 16 << 20  # bytes: two bands and their conversions for one worker
MAX_SHARD = 5_000_000_000  # bytes


def hf2mcore(
    src: PathLike,
    dst: PathLike,
    *,
    workers: int = 0,
    memory: int | str = MEMORY,
    sync: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    checksums: str = "",
    progress: Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert a Hugging Face directory to a Megatron checkpoint. Returns the report; raises TranscoderError.

    options: those of `plan_hf2mcore`. progress: called with a `Progress` after every band.
    resume: go on where an interrupted run with the same arguments stopped, if there was one.
    checksums: `sha256` to note the SHA-256 of every file, too.
    """
    from transcoder.checksums import check_kind
    from transcoder.importing import import_identity, run_import
    from transcoder.iterations import TRACKERS
    from transcoder.publishing import check_free
    from transcoder.reports import costs, import_report
    from transcoder.work import destination

    started = time.monotonic()
    hands = worker_count(workers, memory)
    check_kind(checksums)
    check_free(Path(dst), Path(src), overwrite or resume)
    plan = plan_hf2mcore(src, **options)
    total = sum(spec.nbytes for spec in plan.source.catalog.values())
    run = import_identity(plan, _all_options(plan_hf2mcore, src, options) | {"checksums": checksums})
    how = {"overwrite": overwrite, "resume": resume, "sync": sync}
    with destination(Path(dst), Path(src), run, stale=TRACKERS, **how) as work:
        if not work.finished:
            work.tally = Tally(plan.model, total, progress)
            work.warnings = run_import(plan, work, workers=hands, tally=work.tally, checksums=checksums)
            if verify:
                verify_import(plan, work.out)
    report = import_report(plan, dst)
    report["warnings"] += work.warnings
    return report | costs(started, total, sum(plan.placement.sizes.values()))


def _all_options(planner: Callable[..., Any], src: PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run, defaults included."""
    bound = signature(planner).bind(src, **options)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "src"}


def plan_hf2mcore(
    src: PathLike,
    *,
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    layout: str = "",
    dtype: str = "",
    make_vocab_size_divisible_by: int = 128,
    iteration: int | str = "both",
    arch: str = "",
    norm_names: str = "te",
    mtp: str = "keep",
    follow_links: bool = False,
) -> ImportPlan:
    """The plan of an import, decided and proved from headers and config alone. Raises TranscoderError.

    tp, pp, ep, etp: sizes of tensor, pipeline, expert and expert-tensor parallelism. layout: one of the key dialects
    `stacked`, `per-layer` and `singleton`; by default what Megatron itself uses.
    iteration: `both`, `release` or a number. arch: the Hugging Face class, when the config does not name it.
    mtp: `keep` or `drop` the layers of multi-token prediction.
    """
    from transcoder.importing import plan_import
    from transcoder.mapped import reading

    with reading(Path(src)):
        return plan_import(
            Path(src),
            Mesh(tp, pp, ep, etp),
            layout=layout,
            dtype=dtype,
            divisor=make_vocab_size_divisible_by,
            iteration=iteration,
            arch=arch,
            norm_names=norm_names,
            mtp=mtp,
            follow_links=follow_links,
        )


def worker_count(workers: int, memory: int | str) -> int:
    """Workers that fit `memory` of buffers (bytes, or a text such as 64MiB). Raises UsageError when none does."""
    from transcoder.reports import size_of

    size = size_of(memory)
    if size < SMALLEST_MEMORY:
        raise UsageError(f"--memory: {size} bytes are too few; give at least 16MiB", kind="memory")
    if workers < 0:
        raise UsageError("--workers: give a number of 1 or more", kind="workers")
    return max(1, min(workers or min(4, os.cpu_count() or 1), size // SMALLEST_MEMORY))


def mcore2hf(
    src: PathLike,
    dst: PathLike,
    *,
    workers: int = 0,
    memory: int | str = MEMORY,
    sync: bool = True,
    overwrite: bool = False,
    resume: bool = False,
    verify: bool = False,
    checksums: str = "",
    progress: Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Convert a Megatron checkpoint to a Hugging Face directory. Returns the report; raises TranscoderError.

    options: those of `plan_mcore2hf`. progress: called with a `Progress` after every band.
    resume: go on where an interrupted run with the same arguments stopped, if there was one.
    checksums: `sha256` to note the SHA-256 of every file, too.
    """
    from transcoder.checksums import check_kind
    from transcoder.exporting import export_identity, run_export
    from transcoder.exportplan import stale_weights
    from transcoder.publishing import check_free
    from transcoder.reports import costs, export_report
    from transcoder.work import destination

    started = time.monotonic()
    hands = worker_count(workers, memory)
    check_kind(checksums)
    check_free(Path(dst), Path(src), overwrite or resume)
    plan = plan_mcore2hf(src, **options)
    total = sum(shard.size - len(shard.header) for shard in plan.shards)
    run = export_identity(plan, _all_options(plan_mcore2hf, src, options) | {"checksums": checksums})
    how = {"overwrite": overwrite, "resume": resume, "sync": sync}
    with destination(Path(dst), Path(src), run, whole=True, stale=stale_weights(Path(dst)), **how) as work:
        if not work.finished:
            work.tally = Tally(plan.source.model, total, progress)
            work.warnings = run_export(plan, work, workers=hands, tally=work.tally, checksums=checksums)
            if verify:
                verify_export(plan, work.out)
    return export_report(plan, dst, work.warnings) | costs(started, plan.source.nbytes, total)


def plan_mcore2hf(
    src: PathLike,
    *,
    hf_model: PathLike | None = None,
    arch: str = "",
    dtype: str = "",
    expert_layout: str = "like-source",
    max_shard_size: int | str = MAX_SHARD,
    quantize: str = "",
    follow_links: bool = False,
) -> ExportPlan:
    """The plan of an export, decided and proved from metadata alone. Raises TranscoderError.

    hf_model: directory whose config, tokenizer and shard map are used. max_shard_size: bytes, or a text such as 5GB.
    quantize: `like-source` to write small numbers with scales where the original has them.
    """
    from transcoder.exportplan import plan_export
    from transcoder.mapped import reading
    from transcoder.megatron import open_megatron
    from transcoder.reports import size_of

    reference = Path(hf_model) if hf_model else None
    if quantize not in ("", "like-source"):
        raise UsageError(f"quantize {quantize!r}: give like-source or nothing", kind="quantize")
    layout = "" if expert_layout == "like-source" else expert_layout
    with reading(Path(src)):
        megatron = open_megatron(Path(src), reference, arch, layout, bool(quantize), follow_links=follow_links)
        return plan_export(megatron, dtype=dtype, max_shard=size_of(max_shard_size), quantised=bool(quantize))


def plan(src: PathLike, *, memory: int | str = MEMORY, **options: Any) -> Plan:
    """What hf2mcore (for a Hugging Face directory) or mcore2hf (for a Megatron checkpoint) would do. Writes nothing.

    options: those of `plan_hf2mcore` or `plan_mcore2hf`. Raises TranscoderError.
    """
    from transcoder.checking import is_hf
    from transcoder.description import Plan
    from transcoder.reports import size_of

    if is_hf(Path(src)):
        return Plan("hf2mcore", plan_hf2mcore(src, **options), size_of(memory))
    return Plan("mcore2hf", plan_mcore2hf(src, **options), size_of(memory))


def roundtrip(
    src: PathLike,
    dst: PathLike | None = None,
    *,
    workers: int = 0,
    memory: int | str = MEMORY,
    sync: bool = True,
    overwrite: bool = False,
    megatron_save_path: PathLike | None = None,
    megatron_load_path: PathLike | None = None,
    progress: Listener | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Hugging Face → Megatron → Hugging Face in one pass, every bit compared. Raises DifferenceError, TranscoderError.

    dst: the result is written to dst/MODEL-NAME; without it nothing is written. options: those of `plan_hf2mcore`.
    megatron_save_path: write the Megatron checkpoint, too, and go through it. megatron_load_path: go through this one.
    """
    from transcoder.importing import import_identity
    from transcoder.publishing import check_free
    from transcoder.reports import costs, import_report
    from transcoder.roundtrips import into_files, through_memory
    from transcoder.work import destination

    started = time.monotonic()
    if options.get("mtp") == "drop":
        raise UsageError("a round trip gives everything back: it cannot drop layers", kind="mtp")
    hands = worker_count(workers, memory)
    place = Path(dst) / Path(src).resolve().name if dst else None
    for path in (place, megatron_save_path):
        if path:
            check_free(Path(path), Path(src), overwrite)
    work = plan_hf2mcore(src, **options)
    total = sum(spec.nbytes for spec in work.source.catalog.values())
    tally = Tally(work.model, total, progress)
    run: dict[str, Any] = {"workers": workers, "memory": memory, "sync": sync, "overwrite": overwrite}
    if megatron_save_path:
        hf2mcore(src, megatron_save_path, progress=progress, **run, **options)
    if megatron := megatron_load_path or megatron_save_path:
        _through_files(src, megatron, place, bool(work.source.weights.codecs), **run)
    elif place is None:
        through_memory(work, hands, tally)
    else:
        who = import_identity(work, {"roundtrip": True})
        with destination(place, Path(src), who, overwrite=overwrite, sync=sync, whole=True) as folder:
            into_files(work, folder, hands, tally)
    written = (total if place else 0) + (sum(work.placement.sizes.values()) if megatron_save_path else 0)
    rows = [_row(work, name) for name in work.model.hf]
    report = import_report(work, place)
    report["warnings"] += tally.warnings()
    return report | {"verified": rows} | costs(started, total, written)


def _through_files(src: PathLike, megatron: PathLike, place: Path | None, quantised: bool, **options: Any) -> None:
    """Compare a Megatron checkpoint with `src`, exporting it to `place` first if that is given."""
    if place is not None:
        mcore2hf(megatron, place, hf_model=src, quantize="like-source" if quantised else "", **options)
    verify(src, megatron if place is None else place)


def _row(plan: ImportPlan, name: str) -> dict[str, Any]:
    spec = plan.source.weights.catalog[name]
    return {"tensor": name, "shape": list(spec.shape), "dtype": spec.dtype.name, "matches": True}
