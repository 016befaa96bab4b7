"""CRC-32 of payloads whose bytes pass in any order, by several workers."""

from __future__ import annotations

from threading import Lock

from isal.isal_zlib import crc32, crc32_combine

from transcoder.disk import PIECE, File, write_all
from transcoder.spec import Box, Chunk


class Sums:
    """The ranges of every chunk that have passed; a chunk's checksum once all of it has."""

    def __init__(self) -> None:
        self._parts: dict[tuple[str, Box], list[tuple[int, int, int]]] = {}
        self._covered: dict[tuple[str, Box], int] = {}
        self._lock = Lock()  # one chunk can be touched by two workers: q and v of a layer in two shards

    def add(self, key: str, chunk: Chunk, start: int, count: int, crc: int) -> int | None:
        """Payload bytes [start, start + count) have passed. Returns the chunk's CRC-32 when that completes it."""
        place = key, chunk.box
        with self._lock:
            self._parts.setdefault(place, []).append((start, count, crc))
            self._covered[place] = self._covered.get(place, 0) + count
            done = self._parts.pop(place) if self._covered[place] == chunk.nbytes else None
        return None if done is None else combined(done)

    @property
    def open(self) -> list[tuple[str, Box]]:
        """Chunks of which a part has passed."""
        return list(self._parts)


def write_summed(file: File, data: memoryview, offset: int) -> int:
    """Write bytes at `offset`. Returns their CRC-32, taken piece by piece while the cache still has them."""
    crc = 0
    for begin in range(0, len(data), PIECE):
        piece = data[begin : begin + PIECE]
        write_all(file, piece, offset + begin)
        crc = crc32(piece, crc)
    return crc


def combined(parts: list[tuple[int, int, int]]) -> int:
    """CRC-32 of adjacent ranges given as (start, length, crc). Raises RuntimeError when they are not adjacent."""
    crc = end = 0
    for start, length, part in sorted(parts):
        if start != end:
            raise RuntimeError(f"bytes {end} to {start} were written twice or never")
        crc, end = crc32_combine(crc, part, length), start + length
    return crc
