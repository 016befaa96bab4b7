"""Google Cloud Storage and `memory://`, through obstore, which has no upload ids: a file's parts go out in order."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Lock
from typing import Any, TypeVar

from transcoder.remote.store import CONNECT_SECONDS, IDLE_SECONDS, Entry, Failed, Store

T = TypeVar("T")
KINDS = {
    "NotFoundError": "missing",
    "AlreadyExistsError": "exists",
    "PreconditionError": "changed",
    "PermissionDeniedError": "denied",
    "UnauthenticatedError": "credentials",
}


@lru_cache
def memory(name: str) -> Any:
    """A store that this process alone sees, by name."""
    from obstore.store import MemoryStore

    return MemoryStore()


def google(bucket: str) -> Any:
    """A bucket of Google's; credentials as its own tools find them, none where SKIP_SIGNATURE says so."""
    from datetime import timedelta

    from obstore.store import GCSStore

    seconds = {"connect_timeout": timedelta(seconds=CONNECT_SECONDS), "timeout": timedelta(seconds=4 * IDLE_SECONDS)}
    options: dict[str, Any] = {"client_options": {**seconds, "allow_http": True}, "retry_config": {"max_retries": 0}}
    if os.environ.get("GOOGLE_SKIP_SIGNATURE") == "true":
        options["skip_signature"] = True
    return GCSStore(bucket, **options)


class Objects(Store):
    """A bucket of a store that obstore knows."""

    def __init__(self, url: str, make: Callable[[], Any]) -> None:
        self.url = url
        self._store = _told(make)
        self._writers: dict[str, tuple[Any, dict[int, bytearray], list[int], Lock]] = {}

    def list(self, prefix: str, limit: int) -> dict[str, Entry]:
        """Objects whose names begin with `prefix`."""
        import obstore

        folder, _, _ = prefix.rpartition("/")  # obstore's prefixes are whole folders
        found: dict[str, Entry] = {}

        def collect() -> None:
            for page in obstore.list(self._store, folder or None, chunk_size=1000):
                found.update({row["path"]: _entry(row) for row in page if row["path"].startswith(prefix)})
                if len(found) >= limit:
                    return

        _told(collect)
        return dict(sorted(found.items()))

    def head(self, key: str) -> Entry | None:
        """One object, None when there is none."""
        import obstore

        try:
            return _entry(_told(lambda: obstore.head(self._store, key)))
        except Failed as failure:
            if failure.kind == "missing":
                return None
            raise

    def read(self, key: str, start: int, stop: int, etag: str) -> bytes:
        """The bytes [start, stop) of this version."""
        import obstore

        options: Any = {"range": (start, stop), "if_match": etag}
        return _told(lambda: bytes(obstore.get(self._store, key, options=options).bytes()))

    def put(self, key: str, data: bytes | bytearray, fresh: bool = False) -> str:
        """Write a whole object. Returns its ETag."""
        import obstore

        mode: Any = "create" if fresh else "overwrite"
        found = _told(lambda: obstore.put(self._store, key, bytes(data), mode=mode, use_multipart=False))
        return str(found["e_tag"])

    def delete(self, key: str) -> None:
        """Remove an object, if it is there."""
        import obstore

        if self.head(key):
            _told(lambda: obstore.delete(self._store, key))

    def upload(self, key: str) -> str:
        """Begin an object that comes in parts."""
        import obstore

        writer = _told(lambda: obstore.open_writer(self._store, key, buffer_size=5 << 20, max_concurrency=1))
        self._writers[key] = (writer, {}, [0], Lock())
        return key

    def part(self, key: str, upload: str, number: int, data: bytearray) -> str:
        """Send a part. Returns its ETag."""
        writer, early, ahead, lock = self._writers[key]
        with lock:
            early[number] = data
            while ahead[0] in early:
                _told(lambda: writer.write(early[ahead[0]]))
                del early[ahead[0]]
                ahead[0] += 1
        return str(number)

    def parts(self, key: str, upload: str) -> dict[int, str] | None:
        """The parts that were sent, None when the upload is gone."""
        return None

    def complete(self, key: str, upload: str, etags: Sequence[str]) -> None:
        """Let the object appear."""
        writer, _, _, _ = self._writers.pop(key)
        _told(writer.close)

    def abort(self, key: str, upload: str) -> None:
        """Give the upload up."""
        self._writers.pop(key, None)


def _entry(row: Any) -> Entry:
    return Entry(int(row["size"]), str(row["e_tag"]))


def _told(call: Callable[[], T]) -> T:
    """What `call` returns, obstore's errors as `Failed`."""
    try:
        return call()
    except Exception as error:
        from obstore.exceptions import BaseError

        if not isinstance(error, BaseError | OSError):
            raise
        text = str(error).split("\n\nDebug source")[0].strip().replace("\n", " ")
        raise Failed(KINDS.get(type(error).__name__) or _kind(text), text[:300]) from error


def _kind(text: str) -> str:
    """What obstore, which has one class for most failures, says in words."""
    if "token request" in text:
        return "credentials"
    if status := re.search(r"status code: (\d{3})", text):
        return "transient" if int(status[1]) in (408, 429) or int(status[1]) >= 500 else "other"
    if re.search(r"metadata\.google|computeMetadata|oauth|token", text, re.IGNORECASE):
        return "credentials"
    return "transient" if re.search(r"timed out|connection|error (sending|decoding)", text, re.IGNORECASE) else "other"
