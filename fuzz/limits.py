"""What one input may cost: a second of processor time and 256 MiB of memory, however slow the machine is."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

SECONDS = 1.0
MEMORY = 256 << 20  # bytes
_PAGE = resource.getpagesize()
_STATM = Path("/proc/self/statm")


class TooSlow(BaseException):
    """An input took longer than its second; no reader may catch this."""


@contextmanager
def bounded(seconds: float | None = None, memory: int = MEMORY) -> Iterator[None]:
    """Raise TooSlow in the main thread when time is up; let every allocation above the limit fail."""
    before = resource.getrlimit(resource.RLIMIT_AS)
    handler = signal.signal(signal.SIGVTALRM, _stop)
    resource.setrlimit(resource.RLIMIT_AS, (_used() + memory, before[1]))
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS if seconds is None else seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        resource.setrlimit(resource.RLIMIT_AS, before)
        signal.signal(signal.SIGVTALRM, handler)


def _used() -> int:
    return int(_STATM.read_bytes().split()[0]) * _PAGE


def _stop(_number: int, _frame: FrameType | None) -> None:
    raise TooSlow("too much processor time")
