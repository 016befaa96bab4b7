"""A run whose destination is a prefix of a bucket: lease, journal and uploads; the commit is the last object.

Beside the destination, below `DST.partial/`, lie the lease and the journal; objects go straight to their places.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transcoder.errors import InputError, OutputError, Problem, TranscoderError, UsageError
from transcoder.identity import check_same, check_unchanged
from transcoder.publishing import refused
from transcoder.remote.journal import RemoteJournal
from transcoder.remote.lease import leased
from transcoder.remote.outbox import Outbox
from transcoder.remote.paths import Bucket, RemotePath, as_path, remote
from transcoder.remote.uploads import PART
from transcoder.work import Work, worth_keeping


@dataclass
class RemoteWork(Work):
    """What a run writes into: `out` is the destination itself."""

    outbox: Outbox | None = None

    @property
    def finished(self) -> bool:
        """Never: what is left of a run that has sent everything is done again, and sends nothing."""
        return False

    def begin(self, sizes: Mapping[str, int]) -> None:
        """Begin, or take up, the uploads of objects of these sizes."""
        assert self.outbox is not None
        self.outbox.begin({str((self.out / name).key): size for name, size in sizes.items()})  # type: ignore[attr-defined]


WORKER = 16 << 20  # bytes of the buffers of a worker
SPARE = 4  # parts beyond: of those that are open only the bytes that have come take memory, half of them on average


def share(unfinished: Callable[[int], int], workers: int, memory: int) -> tuple[int, int]:
    """Workers, and bytes for parts that are not full, of `memory`. Raises UsageError when there is too little.

    unfinished: bytes of the parts that so many workers write at a time.
    """
    for count in range(workers, 0, -1):
        if count * WORKER + unfinished(count) <= memory:
            return count, memory - count * WORKER + SPARE * PART
    least = (WORKER + unfinished(1) >> 20) + 1
    message = f"{unfinished(1) >> 20} MiB of parts are written at the same time: give --memory {least}MiB or more"
    raise UsageError(message, kind="memory")


def check_free(dst: RemotePath, src: Path, overwrite: bool) -> RemotePath:
    """Refuse a destination that cannot be written to; its prefix beside it. Raises OutputError, UsageError."""
    there = remote(src)
    if there and (there.is_relative_to(dst) or dst.is_relative_to(there)):
        raise UsageError(f"{dst} and {src} lie inside one another", kind="destination")
    if not dst.key:
        raise refused(as_path(dst), "is a whole bucket", "give a folder of it")
    partial = RemotePath(dst.bucket, f"{dst.key}.partial")
    if not overwrite and _any(partial / "journal"):
        hint = "go on with --resume, or start anew with --overwrite"
        problem = Problem(file=str(partial), found="its journal", hint=hint)
        raise OutputError("there is an unfinished conversion", kind="unfinished", problems=[problem])
    if not overwrite and _any(dst):
        raise refused(as_path(dst), "exists and is not empty", "choose another destination, or give --overwrite")
    return partial


def _any(path: RemotePath) -> bool:
    """Whether there is an object below a prefix."""
    store = path.bucket.store
    return bool(path.bucket.asked(lambda: store.list(f"{path.key}/", 1), path.key))


@contextmanager
def destination(
    dst: RemotePath,
    src: Path,
    identity: Mapping[str, Any],
    *,
    share: tuple[int, int],
    again: bool = False,
    overwrite: bool = False,
    resume: bool = False,
    stale: Iterable[str] = (),
) -> Iterator[RemoteWork]:
    """Uploads that appear at `dst` once the block has ended, the commit last.

    A run that failed leaves them behind if another one can go on with it. share: as `share` gives it.
    again: whether what was written is read before it appears. Raises OutputError for a destination that cannot be used,
    UsageError and InputError when `resume` does not fit.
    """
    partial = check_free(dst, src, overwrite or resume)
    with leased(partial):
        journal = RemoteJournal(partial)
        try:
            if again and (journal.replacing if resume else overwrite and _any(dst)):
                message = "a checkpoint that replaces another one cannot be read before it appears"
                raise UsageError(f"{message}: leave out --verify and --checksums", kind="destination")
            work = _opened(journal, dst, identity, share, overwrite, resume)
            yield from _guarded(work, journal, identity, list(stale))
        finally:
            journal.close()


def _opened(
    journal: RemoteJournal,
    dst: RemotePath,
    identity: Mapping[str, Any],
    share: tuple[int, int],
    overwrite: bool,
    resume: bool,
) -> RemoteWork:
    if journal.identity is not None and resume:
        check_same(journal.identity, identity)
        replacing = journal.replacing
    else:
        _abort(journal, dst.bucket)
        replacing = _any(dst)
        if replacing and not overwrite:
            raise refused(as_path(dst), "exists and is not empty", "choose another destination, or give --overwrite")
        journal.start(dict(identity))
        journal.append({"replacing": replacing})
    journal.replacing = replacing
    outbox = Outbox(dst, journal, replacing, share[1])
    journal.outbox = dst.bucket.outbox = outbox
    return RemoteWork(as_path(dst), as_path(dst), journal, False, hands=share[0], outbox=outbox)


def _abort(journal: RemoteJournal, bucket: Bucket) -> None:
    """Drop what an earlier run has sent: its uploads, and what appeared of a checkpoint that is none."""
    store = bucket.store
    for key, upload in journal.uploads.items():
        if key not in journal.wholes:
            bucket.asked(lambda k=key, u=upload: store.abort(k, u), key)  # type: ignore[misc]
    if not journal.replacing:
        bucket.remove({*journal.uploads, *journal.puts})


def _guarded(
    work: RemoteWork, journal: RemoteJournal, identity: Mapping[str, Any], stale: list[str]
) -> Iterator[RemoteWork]:
    assert work.outbox is not None
    try:
        yield work
        check_unchanged(identity)
        work.outbox.publish(stale)
    except BaseException as error:
        keep = work.outbox.store.resumable and worth_keeping(work, error)
        with suppress(TranscoderError):
            if keep:
                journal.ship()
            else:
                work.outbox.give_up()
                journal.remove()
        _explain(work, error, keep, identity)
        raise
    with suppress(TranscoderError):  # the next run finds everything done
        journal.remove()


def _explain(work: Work, error: BaseException, keep: bool, identity: Mapping[str, Any]) -> None:
    share = f" at {work.tally.share:.0%}" if work.tally else ""
    if not isinstance(error, Exception):
        error.add_note(f"stopped{share}; continue with --resume" if keep else f"stopped{share}; nothing is left")
    elif isinstance(error, InputError):
        check_unchanged(identity, error)
