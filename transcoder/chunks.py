"""Payload ranges of Megatron chunks: read from mapped files and checked, or held in memory for one band."""

from __future__ import annotations

import threading
from collections.abc import Callable

from isal.isal_zlib import crc32

from transcoder.engine import Fetch
from transcoder.errors import Problem, refuse
from transcoder.formats.torch_dist_writer import combined
from transcoder.planner import HfTensor
from transcoder.spec import Box, Chunk


class CheckedChunks:
    """Payload ranges of mapped chunks; the recorded CRC-32 of each is compared once all of it has been read."""

    def __init__(self, view: Callable[[str], memoryview]) -> None:
        self._view = view
        self._parts: dict[tuple[str, Box], list[tuple[int, int, int]]] = {}
        self._covered: dict[tuple[str, Box], int] = {}
        self._lock = threading.Lock()  # one chunk can be read by two workers: q and v of a layer in two shards

    def again(self, key: str, chunk: Chunk, start: int, count: int) -> memoryview:
        """Payload bytes [start, start + count) that `fetch` gives, too, and checks."""
        return self._view(chunk.file)[chunk.offset + start : chunk.offset + start + count]

    def fetch(self, key: str, chunk: Chunk, start: int, count: int) -> memoryview:
        """Payload bytes [start, start + count) of a chunk. Raises InputError when a completed chunk is damaged."""
        data = self.again(key, chunk, start, count)
        place, part = (key, chunk.box), (start, count, crc32(data))
        with self._lock:
            self._parts.setdefault(place, []).append(part)
            self._covered[place] = self._covered.get(place, 0) + count
            done = self._parts.pop(place) if self._covered[place] == chunk.nbytes else None
        if done is not None:
            self._compare(key, chunk, combined(done))
        return data

    def reader(self, tensor: HfTensor) -> Fetch:
        """How a tensor is fetched: a copy of another one is not read for the first time."""
        return self.again if tensor.family.rule.alias else self.fetch

    def finish(self) -> None:
        """Raise RuntimeError when a chunk was read only in part, so that its checksum was never compared."""
        if self._parts:
            raise RuntimeError(f"{next(iter(self._parts))} and {len(self._parts) - 1} more chunks were read in part")

    def _compare(self, key: str, chunk: Chunk, found: int) -> None:
        if chunk.crc is not None and found != chunk.crc:
            expected, got = f"CRC-32 {chunk.crc:08x}", f"{found:08x}"
            problem = Problem(
                file=chunk.file,
                tensor=key,
                expected=expected,
                found=got,
                hint="the payload is damaged: copy the file again",
            )
            raise refuse("checksum", "a payload does not have its recorded checksum", [problem])


class Scratch:
    """Chunk ranges held in memory for one band, so that a round trip needs no files."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, Box], list[tuple[int, bytes]]] = {}

    def store(self, key: str, chunk: Chunk, start: int, data: memoryview) -> None:
        """Keep a range."""
        self._ranges.setdefault((key, chunk.box), []).append((start, bytes(data)))

    def fetch(self, key: str, chunk: Chunk, start: int, count: int) -> memoryview:
        """Give a range back. Raises RuntimeError when it was not stored in full."""
        found = bytearray(count)
        missing = count
        for begin, data in self._ranges.get((key, chunk.box), []):
            low, high = max(start, begin), min(start + count, begin + len(data))
            if low < high:
                found[low - start : high - start] = data[low - begin : high - begin]
                missing -= high - low
        if missing:
            raise RuntimeError(f"{key}: {missing} bytes from {start} are missing")
        return memoryview(found)
