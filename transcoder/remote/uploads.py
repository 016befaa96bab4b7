"""An object written range by range: its bytes are collected in parts, and a part is sent when it is full."""

from __future__ import annotations

from threading import Lock
from typing import TYPE_CHECKING

from transcoder.errors import OutputError

if TYPE_CHECKING:
    from transcoder.remote.outbox import Outbox

PART = 5 << 20  # bytes, the least that S3 takes of a part that is not the last
MOST_PARTS = 9_000  # S3 has 10,000
MIB = 1 << 20


def part_size(size: int) -> int:
    """Bytes of the parts of an object.

    >>> part_size(100 << 30) / MIB
    12.0
    """
    return PART if size <= PART * MOST_PARTS else -(-size // (MOST_PARTS * MIB)) * MIB


class Upload:
    """One object. Every byte is written once; those of parts that an earlier run sent are dropped."""

    def __init__(self, outbox: Outbox, key: str, size: int, upload: str, etags: dict[int, str]) -> None:
        self.key, self.size, self.id = key, size, upload  # no id: it is put as a whole
        self.etags = etags  # of the parts that were sent
        self.step = part_size(size)
        self.count = -(-size // self.step)
        self._outbox = outbox
        self._open: dict[int, bytearray] = {}
        self._filled: dict[int, int] = {}
        self._lock = Lock()

    @property
    def full(self) -> bool:
        """Whether every part was sent."""
        return len(self.etags) == self.count

    def write(self, data: memoryview, offset: int) -> None:
        """Bytes at `offset`. Raises OutputError."""
        while len(data):
            number, first = divmod(offset, self.step)
            piece = data[: self.step - first]
            if number not in self.etags:
                self._fill(number, first, piece)
            data, offset = data[len(piece) :], offset + len(piece)

    def _fill(self, number: int, first: int, piece: memoryview) -> None:
        whole = min(self.step, self.size - number * self.step)
        with self._lock:
            if number not in self._open:
                self._outbox.take(whole)
                self._open[number], self._filled[number] = bytearray(whole), 0
            part = self._open[number]
        part[first : first + len(piece)] = piece
        self._outbox.touch((self.key, number))
        with self._lock:
            self._filled[number] += len(piece)
            if self._filled[number] < whole:
                return
            if self._filled[number] > whole:
                raise OutputError(f"{self.key}: bytes of part {number} were written twice", kind="internal")
        self._send(number)

    def _send(self, number: int) -> None:
        part = self._open[number]
        etag = self._outbox.send(self, number, part)
        with self._lock:
            self.etags[number] = etag
            del self._open[number], self._filled[number]
            full = self.full
        self._outbox.give(len(part))
        self._outbox.sent(self, number, full)
