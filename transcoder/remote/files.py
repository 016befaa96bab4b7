"""The bytes of an object, range by range; each range is fetched when it is sliced, or ahead of that on request."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from threading import Lock
from typing import TYPE_CHECKING

from transcoder.remote.store import Entry

if TYPE_CHECKING:
    from concurrent.futures import Future

    from transcoder.remote.paths import RemotePath

PIECE = 8 << 20  # bytes of one request
STEP, DEPTH = 4 << 20, 4  # bytes of a piece of what is read from one end to the other, and pieces on their way


class RemoteFile:
    """A version of an object. Slices are fetched, each time; `ahead` begins before, for slices of the same bounds."""

    def __init__(self, path: RemotePath, entry: Entry) -> None:
        self.path, self._entry = path, entry
        self._coming: dict[tuple[int, int], Future[memoryview]] = {}
        self._lock = Lock()

    def __len__(self) -> int:
        return self._entry.size

    def __getitem__(self, place: slice) -> memoryview:
        start, stop, _ = place.indices(self._entry.size)
        with self._lock:
            coming = self._coming.pop((start, stop), None)
        return coming.result() if coming else self._fetched(start, stop)

    def ahead(self, ranges: Iterable[tuple[int, int]]) -> None:
        """Begin to fetch these ranges; each of them has to be sliced later."""
        for place in ranges:
            with self._lock:
                if place not in self._coming:
                    self._coming[place] = self.path.bucket.pool.submit(self._fetched, *place)

    def passing(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes [start, stop) in pieces, a few of them on their way at a time."""
        places = [(first, min(first + STEP, stop)) for first in range(start, stop, STEP)]
        for number, (first, last) in enumerate(places):
            self.ahead(places[number : number + DEPTH])
            yield self[first:last]

    def _fetched(self, start: int, stop: int) -> memoryview:
        if stop <= start:
            return memoryview(b"")
        if stop - start <= PIECE:
            return memoryview(self._piece(start, stop))
        whole = bytearray(stop - start)
        for first in range(start, stop, PIECE):
            last = min(first + PIECE, stop)
            whole[first - start : last - start] = self._piece(first, last)
        return memoryview(whole)

    def _piece(self, start: int, stop: int) -> bytes:
        return self.path.bucket.read(self.path.key, start, stop, self._entry.etag)


class RemoteReader(io.RawIOBase):
    """The same, read on like a file."""

    def __init__(self, file: RemoteFile) -> None:
        self._file, self._place = file, 0
        self.size = len(file)

    def readable(self) -> bool:
        """It is."""
        return True

    def read(self, size: int | None = -1) -> bytes:
        """The next `size` bytes, fewer at the end."""
        stop = self.size if size is None or size < 0 else min(self._place + size, self.size)
        data = bytes(self._file[self._place : stop])
        self._place = stop
        return data
