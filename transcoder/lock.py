"""One run at a time in a work folder."""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transcoder.disk import there
from transcoder.errors import OutputError, Problem

LOCK, LEASE = "lock", "lease"
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)  # what a file system without them says


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Nobody else works in `folder` during the block. Raises OutputError naming who does."""
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    lease = False
    try:
        lease = not _locked(file, folder)
        _sign(file)
        yield
    finally:
        if lease:
            (folder / LEASE).unlink(missing_ok=True)
        os.close(file)


def _locked(file: int, folder: Path) -> bool:
    """Take the lock; False if the file system has none and a lease file was made instead."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(folder, os.pread(file, 400, 0).decode(errors="replace"), "wait for it to end") from None
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        _lease(folder)
        return False
    if there(folder / LEASE):
        raise _leased(folder)
    if not _same(file, folder / LOCK):
        raise _busy(folder, "another run, which has just ended", "try again")
    return True


def _same(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _lease(folder: Path) -> None:
    try:
        os.close(os.open(folder / LEASE, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644))
    except FileExistsError:
        raise _leased(folder) from None


def _leased(folder: Path) -> OutputError:
    age = time.time() - (folder / LEASE).stat().st_mtime
    holder = (folder / LOCK).read_text(errors="replace")[:400]
    return _busy(folder, f"{holder}, {age:.0f} seconds ago", f"if it runs no more, remove {folder / LEASE}")


def _sign(file: int) -> None:
    text = f"process {os.getpid()} on {os.uname().nodename}, started {time.strftime('%F %T %z')}"
    os.ftruncate(file, 0)
    os.pwrite(file, text.encode(), 0)


def _busy(folder: Path, holder: str, hint: str) -> OutputError:
    problem = Problem(file=str(folder), found=holder or "another run", hint=hint)
    return OutputError("the destination is being written by another run", kind="locked", problems=[problem])
