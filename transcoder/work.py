"""The work folder `DST.partial` of a run: lock, journal and files, until renames make these the destination."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transcoder.disk import is_folder, sync_folders, there, walk
from transcoder.errors import DifferenceError, InputError, OutputError, Problem, TranscoderError, UsageError
from transcoder.identity import check_same, check_unchanged
from transcoder.journal import NAME as JOURNAL
from transcoder.journal import Journal
from transcoder.lock import LEASE, LOCK, held
from transcoder.progress import Tally
from transcoder.publishing import check_free, entries, keep_foreign, publish, refused

OURS = {LOCK, LEASE, JOURNAL, "out", "out.replaced"}
NOTHING_TO_KEEP = (InputError, DifferenceError, UsageError)  # what these runs wrote is of no use to another one


@dataclass
class Work:
    """What a run writes into: `out` becomes the destination."""

    dst: Path
    out: Path
    journal: Journal
    sync: bool
    tally: Tally | None = None
    warnings: list[str] = field(default_factory=list)
    hands: int = 0  # workers for whose buffers there is room, if that is not known without the destination

    @property
    def finished(self) -> bool:
        """Whether an earlier run had only its renames left."""
        return self.journal.publication is not None

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Ready for payload files of these sizes: those of an earlier run stay if all hold what the journal says.

        Everything else that lies there goes. Raises OutputError when the disk is too small.
        """
        if self.journal.marks and not all(_whole(self.out / name, size) for name, size in sizes.items()):
            self.journal.distrust(0)
        if self.journal.marks and self.sync and not all(_durable(self.out / name) for name in sizes):
            self.journal.distrust(self.journal.synced())
        if not self.journal.marks:
            shutil.rmtree(self.out, ignore_errors=True)
        self.out.mkdir(exist_ok=True)
        _clear(self.out, {self.out / name for name in sizes})
        _check_space(self.out, sizes)
        for name in sizes:
            (self.out / name).parent.mkdir(parents=True, exist_ok=True)


def _whole(path: Path, size: int) -> bool:
    return there(path) and stat.S_ISREG(path.lstat().st_mode) and path.lstat().st_size == size


def _durable(path: Path) -> bool:
    """Whether the kernel could write the file; it tells a failure once, to whoever asks first."""
    file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    try:
        os.fdatasync(file)
    except OSError:
        return False
    finally:
        os.close(file)
    return True


def _clear(root: Path, kept: set[Path]) -> None:
    for folder, names, files in walk(root, topdown=False):
        for path in (Path(folder) / name for name in [*files, *names]):
            if is_folder(path):
                with suppress(OSError):  # it holds what is kept
                    path.rmdir()
            elif path not in kept:
                path.unlink()


def _check_space(out: Path, sizes: Mapping[str, int]) -> None:
    found = [(out / name).stat().st_blocks * 512 for name in sizes if there(out / name)]
    needed, free = sum(sizes.values()) - sum(found), shutil.disk_usage(out).free
    if needed > free:
        problem = Problem(file=str(out), expected=f"{needed} bytes free", found=f"{free}", hint="choose another disk")
        raise OutputError("the disk is too small for the result", kind="space", problems=[problem])


@contextmanager
def destination(
    dst: Path,
    src: Path,
    identity: Mapping[str, Any],
    *,
    overwrite: bool = False,
    resume: bool = False,
    sync: bool = True,
    whole: bool = False,
    stale: Iterable[str] = (),
) -> Iterator[Work]:
    """A work folder beside `dst` whose files appear there once the block has ended.

    A run that failed leaves it behind if another one can go on with it. With `overwrite` what was made replaces what
    `dst` holds: as a `whole` at one moment, or entry by entry, the names in `stale` going; all else in it stays.
    Raises OutputError for a destination that cannot be used, UsageError and InputError when `resume` does not fit.
    """
    partial = check_free(dst, src, overwrite or resume)
    with ExitStack() as stack:
        work = _opened(partial, dst, identity, overwrite, resume, sync, stack)
        try:
            if not (work.finished or overwrite):
                check_free(dst, src, False)
            yield work
            _publish(work, identity, whole, list(stale))
            _remove(partial)
        except BaseException as error:
            keep = worth_keeping(work, error)
            if not keep:
                _remove(partial)
            _explain(work, error, keep, identity)
            raise


def _opened(
    partial: Path, dst: Path, identity: Mapping[str, Any], overwrite: bool, resume: bool, sync: bool, stack: ExitStack
) -> Work:
    new = False
    try:
        new = not there(partial)
        partial.mkdir(parents=True, exist_ok=True)
        if strange := {entry.name for entry in partial.iterdir()} - OURS:
            raise refused(partial, f"holds {min(strange)}, which no run made", "move it away")
        stack.enter_context(held(partial))
        journal = Journal(partial / JOURNAL)
        stack.callback(journal.close)
        _continue(journal, partial, identity, overwrite, resume)
    except TranscoderError:
        raise
    except OSError as error:
        if new:
            _remove(partial)
        raise refused(partial, str(error), "choose a directory that can be written") from error
    return Work(dst, partial / "out", journal, sync, warnings=(journal.publication or {}).get("warnings", []))


def _remove(partial: Path) -> None:
    """Remove a work folder as far as the system lets us; what keeps others out goes last."""
    with suppress(OSError):
        for entry in partial.iterdir():
            if is_folder(entry):
                shutil.rmtree(entry, ignore_errors=True)
            elif entry.name not in (LOCK, LEASE):
                entry.unlink()
        (partial / LOCK).unlink(missing_ok=True)
        (partial / LEASE).unlink(missing_ok=True)
        partial.rmdir()


def _continue(journal: Journal, partial: Path, identity: Mapping[str, Any], overwrite: bool, resume: bool) -> None:
    """Take up the journal or begin it. Raises OutputError, UsageError, InputError."""
    if journal.identity is not None and resume:
        check_same(journal.identity, identity)
    elif journal.identity is not None and not overwrite:
        found = f"{journal.marks} parts are done"
        problem = Problem(file=str(partial), found=found, hint="go on with --resume, or start anew with --overwrite")
        raise OutputError("there is an unfinished conversion", kind="unfinished", problems=[problem])
    else:
        journal.start(dict(identity))


def _publish(work: Work, identity: Mapping[str, Any], whole: bool, stale: list[str]) -> None:
    """The commit: the source is still the same, everything is durable, then renames."""
    journal = work.journal
    if journal.publication is None:
        check_unchanged(identity)
    if whole and is_folder(work.dst) and there(work.out) and not _appeared(work):
        keep_foreign(work.out, work.dst, stale)
    if journal.publication is None:
        if work.sync:
            sync_folders(work.out.parent)
        journal.publish(entries(work.out, work.dst, whole), work.warnings, durable=work.sync)
    publish(work.out, work.dst, (journal.publication or {})["publish"], stale)


def _appeared(work: Work) -> bool:
    """Whether an earlier run has made the exchange, and only its cleaning up is left."""
    found = (work.journal.publication or {}).get("publish", {})
    return bool(found.get(".") == work.dst.stat().st_ino)


def worth_keeping(work: Work, error: BaseException) -> bool:
    """Whether another run can go on with what this one did."""
    lost = isinstance(error, InputError) and error.kind == "source-lost"
    return work.finished or (work.journal.marks > 0 and (lost or not isinstance(error, NOTHING_TO_KEEP)))


def _explain(work: Work, error: BaseException, keep: bool, identity: Mapping[str, Any]) -> None:
    """Tell what is left; an error of the system becomes one of the destination, a changed source the reason."""
    share = f" at {work.tally.share:.0%}" if work.tally else ""
    if not isinstance(error, Exception):
        error.add_note(f"stopped{share}; continue with --resume" if keep else f"stopped{share}; nothing is left")
    elif isinstance(error, InputError):
        check_unchanged(identity, error)
    elif isinstance(error, OSError) and not isinstance(error, TranscoderError):
        hint = (
            "go on with --resume once there is space and the disk works"
            if keep
            else "free some space, or choose another disk"
        )
        raise refused(work.dst, str(error), hint) from error
