"""The memory of a process and all its descendants, shared pages divided between those that share them."""

from __future__ import annotations

import re
import threading
from pathlib import Path

from convert import INTERVAL, children

PSS = re.compile(rb"^Pss:\s+(\d+) kB", re.MULTILINE)
ANONYMOUS = re.compile(rb"^Anonymous:\s+(\d+) kB", re.MULTILINE)


class Watch:
    """Samples a process tree: the highest sums of proportional and of anonymous memory."""

    def __init__(self, pid: int) -> None:
        """Starts the sampling thread; every 100 ms, because proportional memory is slow to read."""
        self.pss = self.anonymous = 0
        self._pid, self._done = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._done.wait(5 * INTERVAL):
            texts = [rollup(pid) for pid in children(self._pid)]
            self.pss = max(self.pss, sum(kib(PSS, text) for text in texts) << 10)
            self.anonymous = max(self.anonymous, sum(kib(ANONYMOUS, text) for text in texts) << 10)

    def stop(self) -> None:
        """Ends the sampling."""
        self._done.set()
        self._thread.join()


def rollup(pid: int) -> bytes:
    """The memory of a process; nothing of one that just ended."""
    try:
        return Path(f"/proc/{pid}/smaps_rollup").read_bytes()
    except OSError:
        return b""


def kib(pattern: re.Pattern[bytes], text: bytes) -> int:
    """A figure of smaps_rollup.

    >>> kib(PSS, b"Rss: 9 kB\\nPss:    7 kB\\nPss_Dirty: 3 kB\\n")
    7
    """
    found = pattern.search(text)
    return int(found[1]) if found else 0
