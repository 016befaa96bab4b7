"""Payload ranges of Megatron chunks: read from mapped files and checked, or held in memory for one band."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from isal.isal_zlib import crc32

from transcoder.engine import Fetch
from transcoder.errors import Problem, refuse
from transcoder.ledger import Part
from transcoder.mapped import ready
from transcoder.moves import Copy, runs
from transcoder.paths import Extent
from transcoder.planner import HfTensor
from transcoder.remote.files import RemoteFile
from transcoder.spec import Box, Chunk
from transcoder.sums import Sums


class CheckedChunks:
    """Payload ranges of mapped chunks; the recorded CRC-32 of each is compared once all of it has been read."""

    def __init__(self, view: Callable[[str], Extent]) -> None:
        self._view, self._sums = view, Sums()

    def again(self, key: str, chunk: Chunk, start: int, count: int) -> memoryview:
        """Payload bytes [start, start + count) that `fetch` gives, too, and checks."""
        first = chunk.offset + start
        return ready(self._view(chunk.file), first, first + count, chunk.file, key)

    def ahead(self, pieces: Iterable[tuple[str, Chunk, Copy]], size: int) -> None:
        """Begin to fetch what holds these pieces, `size` bytes an element, if it has to be fetched."""
        for _, chunk, copy in pieces:
            view = self._view(chunk.file)
            if isinstance(view, RemoteFile):
                starts = ((chunk.offset + run.chunk * size, run.count * size) for run in runs(copy))
                view.ahead((first, first + count) for first, count in starts)

    def fetch(self, key: str, chunk: Chunk, start: int, count: int) -> memoryview:
        """Payload bytes [start, start + count) of a chunk. Raises InputError when a completed chunk is damaged."""
        data = self.again(key, chunk, start, count)
        self.passed(key, chunk, start, count, crc32(data))
        return data

    def passed(self, key: str, chunk: Chunk, start: int, count: int, crc: int) -> None:
        """Payload bytes with this CRC-32 were read. Raises InputError when that completes a damaged chunk."""
        found = self._sums.add(key, chunk, start, count, crc)
        if found is not None and chunk.crc is not None and found != chunk.crc:
            hint = "the payload is damaged: copy the file again"
            expected = f"CRC-32 {chunk.crc:08x}"
            problem = Problem(file=chunk.file, tensor=key, expected=expected, found=f"{found:08x}", hint=hint)
            raise refuse("checksum", "a payload does not have its recorded checksum", [problem])

    def reader(self, tensor: HfTensor, parts: list[Part] | None = None, prefix: str = "") -> Fetch:
        """How a tensor is fetched, `parts` taking what passes: a copy of another one is not read for the first time.

        prefix: of the files' names in `parts`.
        """
        seen = [] if parts is None else parts

        def noted(key: str, chunk: Chunk, start: int, count: int) -> memoryview:
            data = self.again(key, chunk, start, count)
            seen.append((prefix + chunk.file, chunk.offset + start, count, crc32(data)))
            self.passed(key, chunk, start, count, seen[-1][3])
            return data

        if tensor.family.rule.alias:
            return self.again
        return self.fetch if parts is None else noted

    def finish(self) -> None:
        """Raise RuntimeError when a chunk was read only in part, so that its checksum was never compared."""
        if left := self._sums.open:
            raise RuntimeError(f"{left[0]} and {len(left) - 1} more chunks were read in part")


class Scratch:
    """Chunk ranges held in memory for one band, so that a round trip needs no files."""

    def __init__(self) -> None:
        self._ranges: dict[tuple[str, Box], list[tuple[int, bytes]]] = {}

    def store(self, key: str, chunk: Chunk, start: int, data: memoryview) -> int:
        """Keep a range; nobody needs its checksum."""
        self._ranges.setdefault((key, chunk.box), []).append((start, bytes(data)))
        return 0

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
