"""How far every tensor of a run is: kept in the journal, taken up again by the next run."""

from __future__ import annotations

import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from threading import Lock

from isal.isal_zlib import crc32_combine

from transcoder.engine import Sink, TreeDigest
from transcoder.errors import OutputError
from transcoder.journal import Journal
from transcoder.spec import Chunk, DType, TensorSpec

SYNC_BYTES, SYNC_SECONDS = 1 << 30, 5.0  # between two sync points, whichever is over first
READ = "source:"  # before the names of files that were read, where others are written
Part = tuple[str, int, int, int]  # payload file, offset in it, bytes, their CRC-32


@dataclass
class Mark:
    """What an earlier run did of a tensor: its elements before `stop`."""

    stop: int = 0
    leaves: bytes = b""  # their digests
    counts: dict[str, int] = field(default_factory=dict)


class Track:
    """How far one tensor is. `parts` takes what passed since the last mark, `counts` whatever the mover counts.

    ledger: None when nobody will go on with the run.
    """

    def __init__(self, ledger: Ledger | None, name: str, shape: tuple[int, ...], dtype: DType) -> None:
        mark = ledger.taken(name) if ledger else Mark()
        self.name, self.stop, self.counts = name, mark.stop, mark.counts
        self.parts: list[Part] = []
        self.tree = TreeDigest(shape, dtype, mark.leaves)
        self._ledger, self._size = ledger, prod(shape)

    def noting(self, sink: Sink) -> Sink:
        """The same sink; what it writes is noted with the next mark."""

        def noted(key: str, chunk: Chunk, start: int, data: memoryview) -> int:
            crc = sink(key, chunk, start, data)
            self.parts.append((chunk.file, chunk.offset + start, len(data), crc))
            return crc

        return noted

    def count(self, name: str, number: int) -> None:
        """Add to a counter that the next run takes up, too."""
        if number:
            self.counts[name] = self.counts.get(name, 0) + int(number)

    def reach(self, stop: int) -> None:
        """Everything before element `stop` is in its place: noted where the digest has no open leaf."""
        if stop == self._size:
            self.tree.close()
        if self.tree.even and self._ledger:
            parts, size = merged(self.parts), sum(part[2] for part in self.parts)
            row = {"tensor": self.name, "stop": stop, "leaves": self.tree.drain().hex(), "parts": parts}
            self._ledger.note(row | {"counts": self.counts} if self.counts else row, size)
        if self.tree.even:
            self.parts.clear()


class Ledger:
    """The marks of a run. flush: makes all payload files durable, None to leave that to the kernel."""

    def __init__(self, journal: Journal, flush: Callable[[], None] | None) -> None:
        self._journal, self._flush = journal, flush
        self._marks: dict[str, Mark] = {}
        self._lock, self._since, self._synced_at = Lock(), 0, time.monotonic()

        for row in journal.done():
            mark = self._marks.setdefault(row["tensor"], Mark())
            if row["stop"] <= mark.stop:
                message = f"the journal tells twice of {row['tensor']}: start anew with --overwrite"
                raise OutputError(message, kind="journal")
            mark.stop, mark.counts = row["stop"], row.get("counts", {})
            mark.leaves += bytes.fromhex(row["leaves"])

    def restore(
        self, catalog: Mapping[str, TensorSpec], give: Callable[[str, Chunk, int, int, int], None], prefix: str = ""
    ) -> None:
        """Tell what passed of files whose names begin with `prefix`, which is not part of them.

        give: key, chunk, first payload byte, count and CRC-32.
        """
        places = Places(catalog) if self._journal.marks else None
        for row in self._journal.done() if places else ():
            for name, offset, count, crc in row["parts"]:
                file = name.removeprefix(prefix)
                if places and name.startswith(READ) == bool(prefix):
                    key, chunk = places.at(file, offset)
                    give(key, chunk, offset - chunk.offset, count, crc)

    def taken(self, name: str) -> Mark:
        """What is done of a tensor; told once."""
        return self._marks.pop(name, None) or Mark()

    def attend(self, name: str) -> None:
        """The thread goes on with this tensor, of which another one may have moved a part."""
        self._journal.attend(name)

    def note(self, row: dict[str, object], size: int) -> None:
        """Add a mark for `size` bytes that passed; now and then a sync point. Raises OSError."""
        self._journal.append(row)
        self._since += size
        late = time.monotonic() - self._synced_at > SYNC_SECONDS
        if self._flush is not None and (late or self._since > SYNC_BYTES) and self._lock.acquire(blocking=False):
            try:
                self.sync()
            finally:
                self._lock.release()

    def sync(self) -> None:
        """Make all marks durable, after the bytes that they stand for. Raises OSError."""
        if self._flush is not None:
            self._since, marks = 0, self._journal.marks
            try:
                self._flush()
            except OSError:
                self._journal.give_up()
                raise
            self._journal.append({"sync": marks})
            self._journal.sync()
            self._synced_at = time.monotonic()


class Places:
    """Which chunk a byte of a payload file belongs to."""

    def __init__(self, catalog: Mapping[str, TensorSpec]) -> None:
        found: dict[str, list[tuple[int, str, Chunk]]] = {}
        for key, spec in catalog.items():
            for chunk in spec.chunks:
                found.setdefault(chunk.file, []).append((chunk.offset, key, chunk))
        self._chunks = {file: sorted(chunks, key=lambda entry: entry[0]) for file, chunks in found.items()}

    def at(self, file: str, offset: int) -> tuple[str, Chunk]:
        """The key and chunk of a byte. Raises OutputError when no chunk has it."""
        chunks = self._chunks.get(file, [])
        at = bisect_right(chunks, offset, key=lambda entry: entry[0]) - 1
        if at < 0 or offset >= chunks[at][0] + chunks[at][2].nbytes:
            raise OutputError(f"the journal tells of byte {offset} of {file}, which no tensor has", kind="journal")
        return chunks[at][1], chunks[at][2]


def merged(parts: Iterable[Part]) -> list[Part]:
    """The same ranges with neighbours joined.

    >>> from zlib import crc32
    >>> merged([("a", 2, 1, crc32(b"c")), ("a", 0, 2, crc32(b"ab"))]) == [("a", 0, 3, crc32(b"abc"))]
    True
    """
    found: list[Part] = []
    for file, offset, size, crc in sorted(parts):
        if found and found[-1][0] == file and found[-1][1] + found[-1][2] == offset:
            _, start, before, first = found.pop()
            offset, size, crc = start, before + size, crc32_combine(first, crc, size)
        found.append((file, offset, size, crc))
    return found
