"""One conversion from beginning to end: refuse early, plan, run in a work folder, verify, publish, report."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.errors import PathLike, UsageError
from transcoder.places import place
from transcoder.planning import plan_hf2mcore, plan_mcore2hf, plan_reshard
from transcoder.progress import Listener, Tally
from transcoder.remote.paths import remote
from transcoder.remote.uploads import PART

if TYPE_CHECKING:
    from transcoder.importing import ImportPlan
    from transcoder.work import Work

MEMORY = 64 << 20  # bytes of buffers
SMALLEST_MEMORY = 16 << 20  # bytes: two bands and their conversions for one worker


@dataclass(frozen=True)
class How:
    """What does not change the result."""

    workers: int
    memory: int | str
    sync: bool
    overwrite: bool
    resume: bool
    verify: bool
    checksums: str
    progress: Listener | None


@dataclass(frozen=True)
class Kind:
    """A conversion: what to do with its plan."""

    planner: Callable[..., Any]
    model: Callable[[Any], Any]
    total: Callable[[Any], int]  # bytes that pass
    identity: Callable[[Any, Mapping[str, Any]], dict[str, Any]]
    run: Callable[..., list[str]]
    verify: Callable[[Any, Path], None]
    report: Callable[[Any, PathLike, PathLike, list[str]], dict[str, Any]]
    written: Callable[[Any], tuple[int, int]]  # bytes read and written
    unfinished: Callable[[Any], Callable[[int], int]]  # bytes of parts of objects that so many workers write at a time
    whole: bool  # whether the result replaces an old one at one moment
    stale: Callable[[Path], Iterable[str]]


def convert(kind: Kind, src: PathLike, dst: PathLike, how: How, options: dict[str, Any]) -> dict[str, Any]:
    """Do it. Returns the report; raises TranscoderError."""
    from transcoder.checksums import check_kind
    from transcoder.reports import costs

    started, source, target = time.monotonic(), place(src), place(dst, writing=True)
    hands = worker_count(how.workers, how.memory)
    check_kind(how.checksums)
    if options.get("link") and (remote(source) or remote(target)):
        raise UsageError("--link: object stores have no links", kind="link")
    check_destination(target, source, how.overwrite or how.resume)
    plan = kind.planner(source, **options)
    who = kind.identity(plan, _all_options(kind.planner, source, options) | {"checksums": how.checksums})
    with _destination(kind, plan, source, target, who, how, hands) as work:
        if not work.finished:
            work.tally = Tally(kind.model(plan), kind.total(plan), how.progress)
            for there in filter(None, (remote(source), remote(target))):
                there.bucket.stop = work.tally.stop
            work.warnings = kind.run(plan, work, workers=work.hands or hands, tally=work.tally, checksums=how.checksums)
            if how.verify:
                kind.verify(plan, work.out)
    return kind.report(plan, src, dst, work.warnings) | costs(started, *kind.written(plan))


def check_destination(dst: Path, src: Path, overwrite: bool) -> None:
    """Refuse a destination that cannot be written to. Raises OutputError, UsageError."""
    if there := remote(dst):
        from transcoder.remote.work import check_free as check_prefix

        check_prefix(there, src, overwrite)
        return
    from transcoder.publishing import check_free

    check_free(dst, src, overwrite)


def _destination(
    kind: Kind, plan: Any, src: Path, dst: Path, who: Mapping[str, Any], how: How, hands: int
) -> AbstractContextManager[Work]:
    stale, modes = kind.stale(dst), {"overwrite": how.overwrite, "resume": how.resume}
    if there := remote(dst):
        from transcoder.remote import work as remote_work
        from transcoder.reports import size_of

        share = remote_work.share(kind.unfinished(plan), hands, size_of(how.memory))
        return remote_work.destination(
            there, src, who, share=share, stale=stale, again=bool(how.verify or how.checksums), **modes
        )
    from transcoder.work import destination

    return destination(dst, src, who, whole=kind.whole, stale=stale, sync=how.sync, **modes)


def _all_options(planner: Callable[..., Any], src: PathLike, options: dict[str, Any]) -> dict[str, Any]:
    """The options of a run, defaults included."""
    bound = signature(planner).bind(src, **options)
    bound.apply_defaults()
    return {name: value for name, value in bound.arguments.items() if name != "src"}


def worker_count(workers: int, memory: int | str) -> int:
    """Workers that fit `memory` of buffers (bytes, or a text such as 64MiB). Raises UsageError when none does."""
    from transcoder.reports import size_of

    size = size_of(memory)
    if size < SMALLEST_MEMORY:
        raise UsageError(f"--memory: {size} bytes are too few; give at least 16MiB", kind="memory")
    if workers < 0:
        raise UsageError("--workers: give a number of 1 or more", kind="workers")
    return max(1, min(workers or min(4, os.cpu_count() or 1), size // SMALLEST_MEMORY))


def _unfinished(plan: ImportPlan) -> Callable[[int], int]:
    """Of ranks' files those of one pipeline stage have an unfinished part between two tensors."""
    from transcoder.openparts import unfinished

    if plan.placement.form != "torch_dist":
        return unfinished(plan)
    files = -(-sum(size > 0 for size in plan.placement.sizes.values()) // plan.mesh.pp)
    return lambda workers: files * PART


def importing() -> Kind:
    """hf2mcore."""
    from transcoder.importing import import_identity, run_import
    from transcoder.iterations import TRACKERS
    from transcoder.reading import verify_import
    from transcoder.reports import import_report

    def total(plan: Any) -> int:
        return sum(spec.nbytes for spec in plan.source.catalog.values())

    def report(plan: Any, src: PathLike, dst: PathLike, warnings: list[str]) -> dict[str, Any]:
        found = import_report(plan, dst)
        return found | {"warnings": [*found["warnings"], *warnings]}

    return Kind(
        planner=plan_hf2mcore,
        model=lambda plan: plan.model,
        total=total,
        identity=import_identity,
        run=run_import,
        verify=verify_import,
        report=report,
        written=lambda plan: (total(plan), sum(plan.placement.sizes.values())),
        unfinished=_unfinished,
        whole=False,
        stale=lambda dst: TRACKERS,
    )


def exporting() -> Kind:
    """mcore2hf."""
    from transcoder.exporting import export_identity, run_export
    from transcoder.exportplan import stale_weights
    from transcoder.reading import verify_export
    from transcoder.reports import export_report

    def total(plan: Any) -> int:
        return sum(shard.size - len(shard.header) for shard in plan.shards)

    return Kind(
        planner=plan_mcore2hf,
        model=lambda plan: plan.source.model,
        total=total,
        identity=export_identity,
        run=run_export,
        verify=verify_export,
        report=lambda plan, src, dst, warnings: export_report(plan, dst, warnings),
        written=lambda plan: (plan.source.nbytes, total(plan)),
        unfinished=lambda plan: lambda workers: 2 * min(workers, len(plan.shards)) * PART,
        whole=True,
        stale=stale_weights,
    )


def resharding() -> Kind:
    """reshard."""
    from transcoder.iterations import TRACKERS
    from transcoder.reading import verify_reshard
    from transcoder.reports import reshard_report
    from transcoder.resharding import reshard_identity, run_reshard

    def total(plan: Any) -> int:
        return sum(spec.nbytes for spec in plan.target.placement.catalog.values())

    return Kind(
        planner=plan_reshard,
        model=lambda plan: plan.target.model,
        total=total,
        identity=reshard_identity,
        run=run_reshard,
        verify=verify_reshard,
        report=reshard_report,
        written=lambda plan: (plan.source.nbytes, sum(plan.target.placement.sizes.values())),
        unfinished=lambda plan: _unfinished(plan.target),
        whole=False,
        stale=lambda dst: TRACKERS,
    )
