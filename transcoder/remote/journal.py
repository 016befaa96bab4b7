"""The journal of a run that writes to a store: segments beside the destination, each an object of its own.

A mark is written once every part that it stands for has been sent; until then it waits here. What a kill loses are the
marks since the last segment and the parts that were not full: those bytes are read again, and only those parts sent.
"""

from __future__ import annotations

import tempfile
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from threading import RLock
from typing import TYPE_CHECKING, Any

from transcoder.journal import Journal
from transcoder.remote.paths import RemotePath

if TYPE_CHECKING:
    from transcoder.remote.outbox import Outbox, Place

SECONDS = 5.0  # between two segments


class RemoteJournal(Journal):
    """An open journal below `folder`, with a working copy in a temporary file. Raises OutputError."""

    def __init__(self, folder: RemotePath) -> None:
        self._folder = folder / "journal"
        self._temporary = tempfile.TemporaryDirectory(prefix="transcode-")
        path = Path(self._temporary.name) / "journal"
        bucket, store = folder.bucket, folder.bucket.store
        listed = bucket.asked(lambda: store.list(f"{self._folder.key}/", 1 << 20), self._folder.key)
        self._segments = sorted(listed)
        with path.open("wb") as file:
            for key in self._segments:
                entry = listed[key]
                file.write(bucket.asked(lambda k=key, e=entry: store.read(k, 0, e.size, e.etag), key))  # type: ignore[misc]
        self._shipped = path.stat().st_size
        self._ship_lock, self._shipped_at = RLock(), time.monotonic()
        self._waiting: dict[str, deque[tuple[Mapping[str, Any], set[Place]]]] = {}
        self.outbox: Outbox | None = None
        super().__init__(path)
        rows = [row for row, _ in self._rows()]
        self.uploads = {row["upload"]: row["id"] for row in rows if "upload" in row}
        self.completing = {row["completing"] for row in rows if "completing" in row}
        self.wholes = {row["whole"] for row in rows if "whole" in row}
        self.puts = {row["put"] for row in rows if "put" in row}
        self.replacing = any(row.get("replacing") for row in rows)

    def start(self, identity: dict[str, Any]) -> None:
        """Forget everything and begin a run."""
        self.remove()
        self.replacing = False
        self.uploads, self.completing, self.wholes, self.puts = {}, set(), set(), set()
        self._shipped = 0
        super().start(identity)
        self.ship()

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a record; a mark waits for the parts that the thread wrote into, and for the tensor's marks before it."""
        with self._ship_lock:
            if "tensor" not in row or self.outbox is None:
                super().append(row)
                return
            waits = self.outbox.touched()
            self._waiting.setdefault(row["tensor"], deque()).append((row, waits))
            self._settle([row["tensor"]])

    def attend(self, name: str) -> None:
        """What the thread writes from now on is of this tensor."""
        if self.outbox is not None:
            self.outbox.attend(name)

    def safe(self, places: Iterable[Place]) -> None:
        """These parts are where they will be found again."""
        with self._ship_lock:
            found = set(places)
            for rows in self._waiting.values():
                for _, waits in rows:
                    waits -= found
            self._settle(list(self._waiting))

    def _settle(self, tensors: Iterable[str]) -> None:
        for name in tensors:
            rows = self._waiting[name]
            while rows and not rows[0][1]:
                super().append(rows.popleft()[0])
            if not rows:
                del self._waiting[name]

    def breathe(self) -> None:
        """Send what has come since, if that was a while ago."""
        if time.monotonic() - self._shipped_at > SECONDS:
            self.ship()

    def ship(self) -> None:
        """Send what has come since as a segment."""
        with self._ship_lock:
            super().append({"sync": self.marks})
            with self.path.open("rb") as file:
                file.seek(self._shipped)
                data = file.read()
            key = f"{self._folder.key}/{len(self._segments):06d}"
            bucket = self._folder.bucket
            bucket.asked(lambda: bucket.store.put(key, data), key)
            self._segments.append(key)
            self._shipped += len(data)
            self._shipped_at = time.monotonic()

    def sync(self) -> None:
        """Nothing: `ship` is what makes it durable."""

    def remove(self) -> None:
        """Delete all segments."""
        self._folder.bucket.remove(self._segments)
        self._segments = []

    def close(self) -> None:
        """Release the working copy."""
        super().close()
        self._temporary.cleanup()
