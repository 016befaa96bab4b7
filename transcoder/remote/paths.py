"""Objects of a bucket as paths: what the readers ask of a folder, answered from listings of its prefix.

A prefix is listed once, when it is first asked for; sizes and ETags are those of that moment, and every later read
insists on them.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatchcase
from functools import cached_property
from pathlib import Path, PurePosixPath
from threading import Event
from types import SimpleNamespace
from typing import TYPE_CHECKING, TypeVar, cast

from transcoder.errors import InputError, Problem, refuse
from transcoder.remote.errors import explained
from transcoder.remote.store import Entry, Failed, Store, tried

if TYPE_CHECKING:
    from concurrent.futures import ThreadPoolExecutor

    from transcoder.remote.files import RemoteFile, RemoteReader
    from transcoder.remote.outbox import Outbox
    from transcoder.remote.uploads import Upload

T = TypeVar("T")
HELD = "held"  # the ETag of an object that is yet to appear
OBJECTS = 200_000  # of one prefix
READERS = 16  # requests at a time


class Bucket:
    """A store with what is known of it. outbox: where writes to it go, if it is a destination."""

    def __init__(self, store: Store, writing: bool = False) -> None:
        self.store, self.writing = store, writing
        self.outbox: Outbox | None = None
        self.stop = Event()  # set when nothing is worth waiting for any more
        self._listed: dict[str, dict[str, Entry]] = {}
        self._inside: dict[str, dict[str, list[str]]] = {}

    @cached_property
    def pool(self) -> ThreadPoolExecutor:
        """Threads for requests that need not wait for each other."""
        from concurrent.futures import ThreadPoolExecutor

        return ThreadPoolExecutor(READERS, thread_name_prefix="remote")

    def asked(self, call: Callable[[], T], key: str) -> T:
        """What `call` returns, tried a few times. Raises InputError or OutputError naming the object."""
        try:
            return tried(call, self.stop)
        except Failed as failure:
            raise explained(failure, f"{self.store.url}/{key}", self.writing) from failure

    def listed(self, prefix: str) -> dict[str, Entry]:
        """Every object whose name begins with `prefix`. Raises InputError when there are far too many."""
        for known, entries in self._listed.items():
            if prefix.startswith(known):
                return entries
        found = self.asked(lambda: self.store.list(prefix, OBJECTS), prefix)
        if len(found) >= OBJECTS:
            problem = Problem(file=f"{self.store.url}/{prefix}", expected=f"fewer than {OBJECTS} objects")
            raise refuse("not-found", "this prefix holds more than one checkpoint", [problem])
        if self.outbox is not None:
            found |= {key: Entry(len(data), HELD) for key, data in self.outbox.held.items() if key.startswith(prefix)}
        self._listed[prefix] = found
        return found

    def inside(self, prefix: str) -> list[str]:
        """Names of what lies in a folder, whose prefix ends in a slash, in order."""
        entries = self.listed(prefix)
        known = next(known for known in self._listed if prefix.startswith(known))
        if known not in self._inside:
            table: dict[str, dict[str, None]] = {}
            for key in entries:
                while key:
                    folder, _, name = key.rpartition("/")
                    above = f"{folder}/" if folder else ""
                    if name in table.setdefault(above, {}):
                        break
                    table[above][name] = None
                    key = folder
            self._inside[known] = {folder: sorted(filter(None, names)) for folder, names in table.items()}
        return self._inside[known].get(prefix, [])

    def read(self, key: str, start: int, stop: int, etag: str) -> bytes:
        """The bytes [start, stop) of a version of an object. Raises InputError or OutputError."""

        def once() -> bytes:
            data = self.store.read(key, start, stop, etag)
            if len(data) != stop - start:
                raise Failed("transient", f"{len(data)} bytes came for a range of {stop - start}")
            return data

        if etag == HELD and self.outbox is not None:
            return self.outbox.held[key][start:stop]
        return self.asked(once, key)

    def remove(self, keys: Iterable[str]) -> None:
        """Delete objects, those that are there. Raises OutputError."""
        for _ in self.pool.map(lambda key: self.asked(lambda: self.store.delete(key), key), sorted(keys)):
            pass

    def path(self, url: str) -> Path:
        """The object of this URL, which is one of this store's."""
        return as_path(RemotePath(self, url.removeprefix(self.store.url).strip("/")))

    def forget(self) -> None:
        """What was listed may have changed."""
        self._listed.clear()
        self._inside.clear()


class RemotePath:
    """An object or a prefix of a bucket; as much of `pathlib.Path` as readers use."""

    __slots__ = ("bucket", "key")

    def __init__(self, bucket: Bucket, key: str) -> None:
        self.bucket, self.key = bucket, key

    def __str__(self) -> str:
        return f"{self.bucket.store.url}/{self.key}" if self.key else self.bucket.store.url

    __repr__ = __str__

    def __truediv__(self, name: object) -> RemotePath:
        parts = [part for part in self.key.split("/") if part]
        for part in str(name).split("/"):
            if part == "..":
                parts = parts[:-1]
            elif part not in ("", "."):
                parts.append(part)
        return RemotePath(self.bucket, "/".join(parts))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __lt__(self, other: RemotePath) -> bool:
        return self.key < other.key

    @property
    def name(self) -> str:
        """The last part of the name."""
        return self.key.rpartition("/")[2] or self.bucket.store.url.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The last part's ending."""
        return PurePosixPath(self.key).suffix

    @property
    def stem(self) -> str:
        """The last part without its ending."""
        return PurePosixPath(self.key).stem

    @property
    def parent(self) -> RemotePath:
        """What this is in; a bucket is in itself."""
        return RemotePath(self.bucket, self.key.rpartition("/")[0])

    @property
    def _prefix(self) -> str:
        return f"{self.key}/" if self.key else ""

    def _near(self) -> dict[str, Entry]:
        """A listing that would hold this very object."""
        return self.bucket.listed(self.parent._prefix)

    def entry(self) -> Entry | None:
        """This object, as it was listed."""
        for known, entries in self.bucket._listed.items():
            if self.key.startswith(known):
                return entries.get(self.key)
        return self._near().get(self.key) if self.parent.key else self.bucket.listed(self.key).get(self.key)

    def is_file(self) -> bool:
        """Whether it is an object."""
        return bool(self.key) and self.entry() is not None

    def is_dir(self) -> bool:
        """Whether there are objects below it."""
        return bool(self.bucket.inside(self._prefix))

    def exists(self) -> bool:
        """Whether it is either."""
        return self.is_file() or self.is_dir()

    def is_symlink(self) -> bool:
        """Never: stores have no links."""
        return False

    def symlink_to(self, target: str) -> None:
        """Raises OSError."""
        raise OSError(errno.EOPNOTSUPP, "object stores have no links", str(self))

    def lstat(self) -> os.stat_result:
        """Kind and size. Raises FileNotFoundError."""
        if self.is_file() and (entry := self.entry()):
            return cast(os.stat_result, SimpleNamespace(st_mode=stat.S_IFREG | 0o644, st_size=entry.size))
        if self.is_dir():
            return cast(os.stat_result, SimpleNamespace(st_mode=stat.S_IFDIR | 0o755, st_size=0))
        raise FileNotFoundError(errno.ENOENT, "no such object", str(self))

    stat = lstat

    def facts(self) -> list[int | str]:
        """What an identity knows of the object, asked anew: its size, its ETag. Raises InputError."""
        found = self.bucket.asked(lambda: self.bucket.store.head(self.key), self.key)
        if found is None:
            problem = Problem(file=str(self), found="no such object")
            raise InputError("a file of the source is gone", kind="source-changed", problems=[problem])
        return [found.size, found.etag, ""]

    def iterdir(self) -> Iterator[RemotePath]:
        """What lies in it, in order."""
        return (self / name for name in self.bucket.inside(self._prefix))

    def glob(self, pattern: str) -> Iterator[RemotePath]:
        """Those whose names match a pattern without slashes."""
        return (path for path in self.iterdir() if fnmatchcase(path.name, pattern))

    def rglob(self, pattern: str) -> Iterator[RemotePath]:
        """All objects below it whose last names match."""
        keys = [key for key in self.bucket.listed(self._prefix) if key.startswith(self._prefix)]
        return (path for key in keys if fnmatchcase((path := RemotePath(self.bucket, key)).name, pattern))

    def relative_to(self, other: RemotePath) -> PurePosixPath:
        """The name below `other`."""
        return PurePosixPath(self.key).relative_to(other.key)

    def is_relative_to(self, other: object) -> bool:
        """Whether it is below `other`, or `other` itself."""
        return isinstance(other, RemotePath) and f"{self}/".startswith(f"{other}/")

    def resolve(self, strict: bool = False) -> RemotePath:
        """Itself: it has no other name."""
        return self

    absolute = resolve

    def upload(self, size: int) -> Upload:
        """The object, to be written: it has `size` bytes."""
        return self._outbox.file(self.key, size)

    def put(self, data: bytes | memoryview) -> None:
        """The object, written as a whole."""
        self._outbox.put(self.key, data)

    @property
    def _outbox(self) -> Outbox:
        if self.bucket.outbox is None:
            raise RuntimeError(f"{self}: nothing is written here")
        return self.bucket.outbox

    def open(self) -> RemoteFile:
        """The object's bytes, fetched where they are asked for. Raises InputError."""
        from transcoder.remote.files import RemoteFile

        entry = self.entry()
        if entry is None:
            problem = Problem(file=str(self), found="no such object")
            raise refuse("file", "a file of the checkpoint cannot be read", [problem])
        return RemoteFile(self, entry)

    def reader(self) -> RemoteReader:
        """The same as a file that is read on. Raises FileNotFoundError, InputError."""
        from transcoder.remote.files import RemoteReader

        if not self.is_file():
            raise FileNotFoundError(errno.ENOENT, "no such object", str(self))
        return RemoteReader(self.open())


def remote(path: object) -> RemotePath | None:
    """`path` if it is an object store's."""
    return path if isinstance(path, RemotePath) else None


def as_path(path: RemotePath) -> Path:
    """The same for readers, which name the type of local paths."""
    return cast(Path, path)
