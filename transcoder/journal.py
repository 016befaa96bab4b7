"""The journal of a run: an append-only file in its work folder from which another run learns what is done.

A record is a line `crc32 json`. The first says what the run is; then one for every mark, written after the bytes that
it stands for. A torn last line is dropped and a bad one elsewhere ends what is believed. While the machine has not
restarted every mark counts, since written pages outlive a process; afterwards only the marks do that a sync record
covers.
"""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from threading import Lock
from typing import Any
from zlib import crc32

NAME = "journal"
VERSION = 1
LINE_LIMIT = 1 << 26  # bytes
Row = dict[str, Any]


def boot_id() -> str:
    """Changes whenever the machine starts; empty where the system does not tell."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _line(row: Mapping[str, Any]) -> bytes:
    text = json.dumps(row, separators=(",", ":"), ensure_ascii=False).encode()
    return b"%08x %s\n" % (crc32(text), text)


def _row(line: bytes) -> Row | None:
    """The record of a line, None for a damaged one."""
    check, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or check != b"%08x" % crc32(text):
        return None
    try:
        row = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


class Journal:
    """An open journal. Raises OSError."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
        self._lock = Lock()
        self.identity: Row | None = None
        self.marks = 0
        self.publication: Row | None = None
        self._given_up = False
        self._recover()

    def _rows(self) -> Iterator[tuple[Row, int]]:
        """Records that can be believed, each with the position after it."""
        place = 0
        with self.path.open("rb") as file:
            while line := file.readline(LINE_LIMIT):
                row, place = _row(line), place + len(line)
                if row is None:
                    return
                yield row, place

    def _recover(self) -> None:
        """Count the marks that hold, and cut off everything after them."""
        boot, synced, end = "", 0, 0
        for row, place in self._rows():
            end = place
            self.identity = self.identity or row
            self.marks += "tensor" in row
            synced = min(row.get("sync", synced), self.marks)
            boot = row.get("boot", boot)
            self.publication = row if "publish" in row else self.publication
        os.ftruncate(self._file, end)
        if self.identity is not None and (boot != boot_id() or not boot):
            self.distrust(synced)

    def distrust(self, count: int) -> None:
        """Believe the first `count` marks only. Raises OSError."""
        if count < self.marks:
            self._cut(count)
        self.append({"sync": count, "boot": boot_id()})

    def _cut(self, count: int) -> None:
        marks = end = 0
        for number, (row, place) in enumerate(self._rows()):
            if number == 0 or ("tensor" in row and marks < count):
                marks, end = marks + ("tensor" in row), place
        os.ftruncate(self._file, end)
        self.marks, self.publication = marks, None

    def synced(self) -> int:
        """How many marks a sync record covers."""
        return max((row["sync"] for row, _ in self._rows() if "sync" in row), default=0)

    def give_up(self) -> None:
        """A file could not be made durable: nothing after the last sync point counts, and nothing more is noted.

        Pages that could not be written may be gone, and asking again proves nothing. Cutting a file needs no space.
        """
        with self._lock:
            self._given_up = True
            try:
                self._cut(self.synced())
            except OSError:
                self.path.unlink(missing_ok=True)

    def start(self, identity: Row) -> None:
        """Forget everything and begin a run."""
        os.ftruncate(self._file, 0)
        self.identity, self.marks, self.publication = {**identity, "boot": boot_id()}, 0, None
        self.append(self.identity)

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a record."""
        data = _line(row)
        with self._lock:
            if self._given_up:
                return
            if os.write(self._file, data) != len(data):
                raise OSError(errno.ENOSPC, "no space left for the journal", str(self.path))
            self.marks += "tensor" in row

    def attend(self, name: str) -> None:
        """The thread goes on with this tensor: of interest where marks wait for what it writes."""

    def publish(self, entries: Mapping[str, int], warnings: list[str], *, durable: bool) -> None:
        """Note, durably, that everything is complete and which entries are about to appear. Raises OSError.

        durable: whether what is complete is so, too; if not, a restart of the machine makes the record void.
        """
        row = {"publish": dict(entries), "sync": self.marks if durable else 0, "warnings": warnings}
        self.append(row)
        self.sync()
        self.publication = row

    def done(self) -> Iterator[Row]:
        """The marks, in order."""
        return (row for row, _ in self._rows() if "tensor" in row)

    def sync(self) -> None:
        """Make the journal durable."""
        os.fdatasync(self._file)

    def close(self) -> None:
        """Release the descriptor."""
        with suppress(OSError):  # what counts was made durable before
            os.close(self._file)
