"""What the rest asks of an object store, and how its failures are told apart."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from threading import Event
from typing import TypeVar

T = TypeVar("T")
TRIES = 5
TOTAL_SECONDS = 120.0  # of all tries of one request
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 20.0  # seconds between two tries
CONNECT_SECONDS, IDLE_SECONDS = 10, 30


@dataclass(frozen=True, slots=True)
class Entry:
    """An object: its size in bytes and what tells this version of it from others."""

    size: int
    etag: str


class Failed(Exception):  # noqa: N818 (it is told apart by its kind)
    """A request failed. kind: transient, missing, bucket, credentials, denied, changed, exists, endpoint or other."""

    def __init__(self, kind: str, text: str, after: float = 0.0) -> None:
        super().__init__(text)
        self.kind = kind
        self.after = after  # seconds that the store asks to wait


class Store:
    """One bucket, which can be read only unless a method says otherwise. Every method raises `Failed`; none retries."""

    url: str  # of the bucket, without a slash at the end
    resumable = False  # whether another process can go on with an upload

    def list(self, prefix: str, limit: int) -> dict[str, Entry]:
        """Objects whose names begin with `prefix`, at most `limit` or a little more, in order of their names."""
        raise NotImplementedError

    def head(self, key: str) -> Entry | None:
        """One object, None when there is none."""
        raise NotImplementedError

    def read(self, key: str, start: int, stop: int, etag: str) -> bytes:
        """The bytes [start, stop) of this version of an object."""
        raise NotImplementedError

    def put(self, key: str, data: bytes | bytearray, fresh: bool = False) -> str:
        """Write a whole object. fresh: fail with `exists` when there is one. Returns its ETag."""
        raise self._read_only()

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        raise self._read_only()

    def upload(self, key: str) -> str:
        """Begin an object that comes in parts. Returns the id of the upload."""
        raise self._read_only()

    def part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        """One part, numbers from 0. Returns its ETag."""
        raise self._read_only()

    def parts(self, key: str, upload: str) -> dict[int, str] | None:
        """The parts that an upload has, None when there is no such upload any more."""
        raise self._read_only()

    def complete(self, key: str, upload: str, etags: Sequence[str]) -> None:
        """Let the object appear."""
        raise self._read_only()

    def abort(self, key: str, upload: str) -> None:
        """Give an upload up."""
        raise self._read_only()

    def _read_only(self) -> Failed:
        return Failed("other", f"{self.url} can be read only")


def tried(call: Callable[[], T], stop: Event | None = None) -> T:
    """What `call` returns; asked again, a few times and later and later, while failures are of the passing kind.

    stop: ends the waiting. Raises Failed.
    """
    from random import uniform

    stop = stop or Event()
    began, pause = time.monotonic(), FIRST_PAUSE
    for left in reversed(range(TRIES)):
        try:
            return call()
        except Failed as failure:
            wait = max(failure.after, pause * uniform(0.5, 1.0))
            late = time.monotonic() - began + wait > TOTAL_SECONDS
            if failure.kind != "transient" or not left or late or stop.wait(wait):
                raise
            pause = min(2 * pause, LONGEST_PAUSE)
    raise AssertionError("unreachable")
