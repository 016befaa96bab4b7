"""What can go wrong with a call of the system: which errors are apt for it, and what else may happen."""

from __future__ import annotations

import errno
from dataclasses import dataclass

Errors = dict[str, tuple[int, ...]]
FLUSHES = {"fsync", "fdatasync"}
TRANSFERS = {"write", "pwrite", "read", "pread", "readinto"}
GROWS = {"write", "pwrite", "posix_fallocate", "mkdir", "symlink", "link", "open to write", *FLUSHES}
LOOKS = ("stat", "lstat", "listdir", "scandir", "open to read", "readlink")
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES)
ERRORS: Errors = dict.fromkeys(("fstat", "access", "statvfs", "read", "pread", "readinto"), (errno.EIO, errno.ESTALE))
ERRORS |= dict.fromkeys(LOOKS, (errno.EIO, errno.EACCES, errno.ESTALE))
ERRORS |= {
    "madvise": (errno.EFAULT, errno.EIO),
    "mmap": (errno.ENOMEM, errno.ENODEV),
    "flock": (errno.EIO, errno.ENOLCK),
    "close": (errno.EIO, errno.EDQUOT),
    "posix_fallocate": (errno.ENOSPC, errno.EOPNOTSUPP, errno.EFBIG),
    "write": (errno.ENOSPC, errno.EIO, errno.EINTR),
    "pwrite": (errno.ENOSPC, errno.EIO, errno.EDQUOT),
}


class Crash(BaseException):
    """The process, or the machine, is no more."""


@dataclass(frozen=True)
class Fault:
    """What happens at call number `at`: `error`, `short`, `full`, `crash` or `torn`. turn: which of the apt errors."""

    at: int = 0
    kind: str = ""
    turn: int = 0

    def fits(self, name: str) -> bool:
        """Whether a call of this name can fail so."""
        if self.kind == "full":
            return name in GROWS
        if self.kind in ("short", "torn"):
            return name in (TRANSFERS if self.kind == "short" else {"write", "pwrite"})
        return True

    def number(self, name: str) -> int:
        """The system's number of the error."""
        apt = ERRORS.get(name, WRITE_ERRORS)
        return errno.ENOSPC if self.kind == "full" else apt[(self.at + self.turn) % len(apt)]


@dataclass(frozen=True)
class Call:
    """A call that was counted."""

    name: str
    path: str
