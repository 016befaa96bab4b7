"""The operations behind the commands and the Python API; each returns a report of plain values."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder import converting
from transcoder.converting import MEMORY, How, convert, worker_count
from transcoder.errors import PathLike, UsageError
from transcoder.places import place as as_place
from transcoder.planning import plan_hf2mcore, plan_mcore2hf
from transcoder.progress import Listener, Tally
from transcoder.reading import verify
from transcoder.remote.paths import remote

if TYPE_CHECKING:
    from transcoder.description import Plan
    from transcoder.importing import ImportPlan


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
    how = How(workers, memory, sync, overwrite, resume, verify, checksums, progress)
    return convert(converting.importing(), src, dst, how, options)


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

    options: those of `plan_mcore2hf`; the others as in `hf2mcore`.
    """
    how = How(workers, memory, sync, overwrite, resume, verify, checksums, progress)
    return convert(converting.exporting(), src, dst, how, options)


def reshard(
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
    """Convert a Megatron checkpoint to another grid, key dialect or dtype. Returns the report; raises TranscoderError.

    options: those of `plan_reshard`; the others as in `hf2mcore`.
    """
    how = How(workers, memory, sync, overwrite, resume, verify, checksums, progress)
    return convert(converting.resharding(), src, dst, how, options)


def plan(src: PathLike, *, memory: int | str = MEMORY, **options: Any) -> Plan:
    """What hf2mcore (for a Hugging Face directory) or mcore2hf (for a Megatron checkpoint) would do. Writes nothing.

    options: those of `plan_hf2mcore` or `plan_mcore2hf`. Raises TranscoderError.
    """
    from transcoder.description import Plan
    from transcoder.formats.huggingface import is_hf
    from transcoder.reports import size_of

    src = as_place(src)
    if is_hf(src):
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
    if options.get("merge_adapter"):
        raise UsageError("a round trip gives everything back: it cannot merge an adapter", kind="adapter")
    hands = worker_count(workers, memory)
    source = as_place(src)
    place = as_place(dst) / source.resolve().name if dst else None
    if remote(place):
        raise UsageError("a round trip writes to a directory; its source may be a URL", kind="destination")
    for path in (place, megatron_save_path):
        if path:
            check_free(as_place(path), source, overwrite)
    work = plan_hf2mcore(source, **options)
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
        with destination(place, source, who, overwrite=overwrite, sync=sync, whole=True) as folder:
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
