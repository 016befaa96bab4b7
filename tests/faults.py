"""A layer over `os`, `io`, `mmap` and `fcntl` that counts every call below given folders and makes one of them fail.

It knows nothing of the product. A fault is an error, a short transfer, a full disk, or a death after which nothing is
done any longer: not by the thread that died, not by others, not by anybody's cleaning up. What a power loss would have
left then is told by the model of the disk in `power`.
"""

from __future__ import annotations

import builtins
import ctypes
import errno
import fcntl
import io
import mmap
import os
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from power import Disk

T = TypeVar("T")
BOOT = "/proc/sys/kernel/random/boot_id"
READS = {"stat", "lstat", "fstat", "listdir", "scandir", "readlink", "access", "statvfs", "read", "pread", "readinto"}
READS |= {"mmap", "madvise", "open to read", "flock"}
FLUSHES = {"fsync", "fdatasync"}
TRANSFERS = {"write", "pwrite", "read", "pread", "readinto"}
GROWS = {"write", "pwrite", "posix_fallocate", "mkdir", "symlink", "link", "open to write", "fsync", "fdatasync"}
ONE_PATH = ("mkdir", "unlink", "remove", "rmdir", "stat", "lstat", "listdir", "scandir", "readlink", "access")
ONE_PATH += ("statvfs", "chmod", "utime", "truncate")
ON_FILES = ("write", "pwrite", "read", "pread", "fsync", "fdatasync", "posix_fallocate", "ftruncate", "fstat", "close")
ON_FILES += ("posix_fadvise", "fchmod")
ERRORS = {name: (errno.EIO, errno.ESTALE) for name in READS}
ERRORS |= {name: (errno.EIO, errno.EACCES) for name in ("stat", "lstat", "listdir", "scandir", "open to read", "readlink")}
ERRORS |= {"madvise": (errno.EFAULT, errno.EIO), "mmap": (errno.ENOMEM, errno.ENODEV), "flock": (errno.EIO, errno.ENOLCK)}
WRITE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EACCES)
ERRORS |= {"close": (errno.EIO, errno.EDQUOT), "posix_fallocate": (errno.ENOSPC, errno.EOPNOTSUPP, errno.EFBIG)}
ERRORS |= {"write": (errno.ENOSPC, errno.EIO, errno.EINTR), "pwrite": (errno.ENOSPC, errno.EIO, errno.EDQUOT)}


class Crash(BaseException):
    """The process, or the machine, is no more."""


@dataclass(frozen=True)
class Fault:
    """What happens at call number `at`: `error`, `short`, `full`, `crash` or `torn`. turn: which of the apt errors."""

    at: int = 0
    kind: str = ""
    turn: int = 0

    def fits(self, name: str) -> bool:
        """Whether a call of this name can fail so."""
        if self.kind == "full":
            return name in GROWS
        if self.kind in ("short", "torn"):
            return name in (TRANSFERS if self.kind == "short" else {"write", "pwrite"})
        return True

    def number(self, name: str) -> int:
        """The system's number of the error."""
        apt = ERRORS.get(name, WRITE_ERRORS)
        return errno.ENOSPC if self.kind == "full" else apt[(self.at + self.turn) % len(apt)]


@dataclass(frozen=True)
class Call:
    """A call that was counted."""

    name: str
    path: str


class Layer:
    """Patches the calls while it is entered. roots: folders whose calls count. disk: the folder that may lose data."""

    active: Layer | None = None

    def __init__(self, roots: Iterable[Path], fault: Fault | None = None, *, disk: Path | None = None, **how: Any) -> None:
        self.roots = tuple(os.path.realpath(root) for root in roots)
        self.fault, self.calls, self.hit = fault or Fault(), list[Call](), None
        self.disk = Disk(disk) if disk else None
        self.boot: str = how.get("boot", "first start")
        self.exchange: bool = how.get("exchange", True)
        self.dead, self.boots, self.hit = False, 0, None
        self._lock, self._opened, self._undo = threading.RLock(), set[int](), list[tuple[Any, str, Any]]()
        self.hit: Call | None

    def __enter__(self) -> Layer:
        assert Layer.active is None
        Layer.active = self
        self.real = {name: getattr(os, name) for name in (*ONE_PATH, *ON_FILES, "open", "rename", "replace")}
        self.real |= {"symlink": os.symlink, "link": os.link, "io.open": io.open, "flock": fcntl.flock}
        for name in ONE_PATH:
            self._patch(os, name, self._one_path(name))
        for name in ON_FILES:
            self._patch(os, name, self._on_file(name))
        for name in ("rename", "replace", "symlink", "link"):
            self._patch(os, name, self._two_paths(name))
        self._patch(os, "open", self._os_open)
        self._patch(io, "open", self._io_open)
        self._patch(builtins, "open", self._io_open)
        self._patch(fcntl, "flock", self._flock)
        self._patch(mmap, "mmap", _mapping(self))
        self._patch(ctypes, "CDLL", _Library)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            setattr(*self._undo.pop())
        Layer.active = None
        while self._opened:
            self.real["close"](self._opened.pop())

    def _patch(self, owner: Any, name: str, new: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def path_of(self, place: Any, folder: int | None = None) -> str:
        """The absolute path that an argument means, "" when it is not below the roots."""
        if isinstance(place, int):
            found = self._of_file(place)
        else:
            text = os.fsdecode(place)
            above = self._of_file(folder) if folder is not None and not os.path.isabs(text) else os.getcwd()
            found = os.path.normpath(os.path.join(above, text))
        return found if any(found == root or found.startswith(f"{root}/") for root in self.roots) else ""

    def _of_file(self, file: int) -> str:
        try:
            return self.real["readlink"](f"/proc/self/fd/{file}").removesuffix(" (deleted)")
        except OSError:
            return ""

    def call(self, name: str, path: str, act: Callable[[], T], torn: Callable[[], T] | None = None) -> T:
        """Do it, unless it has to fail. torn: what a short transfer does."""
        with self._lock:
            if self.dead:
                raise Crash(f"{name} after the end")
            if not path:
                return act()
            self.calls.append(Call(name, path))
            if self.fault.at > len(self.calls) or not self.fault.at or not self.fault.fits(name):
                return act()
            if self.fault.at < len(self.calls) and self.fault.kind != "full":
                return act()
            self.hit = self.hit or self.calls[-1]
            return self._fail(name, path, act, torn)

    def _fail(self, name: str, path: str, act: Callable[[], T], torn: Callable[[], T] | None) -> T:
        kind = self.fault.kind
        if kind in ("short", "torn") and torn is not None:
            done = torn()
            if kind == "short":
                return done
        if kind in ("crash", "torn"):
            self.dead = True
            raise Crash(f"{name} {path}")
        if name == "close":
            act()
        number = self.fault.number(name)
        raise OSError(number, os.strerror(number), path)

    def _one_path(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def patched(path: Any = ".", *args: Any, **named: Any) -> Any:
            return self.call(name, self.path_of(path, named.get("dir_fd")), lambda: self._noted(name, real, path, args, named))

        return patched

    def _noted(self, name: str, real: Callable[..., Any], path: Any, args: Any, named: Any) -> Any:
        where = self._in_disk(path, named.get("dir_fd")) if name in ("mkdir", "unlink", "remove", "rmdir") else None
        found = real(path, *args, **named)
        if where and self.disk:
            self.disk.created(where) if name == "mkdir" else self.disk.removed(where)
        return found

    def _in_disk(self, path: Any, folder: int | None = None) -> Path | None:
        """The path as the model knows it, if it is in the folder that may lose data."""
        text = self.path_of(path, folder)
        return Path(text) if text and self.disk and f"{text}/".startswith(f"{self.disk.top}/") else None

    def _two_paths(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def patched(one: Any, two: Any, *args: Any, **named: Any) -> Any:
            def act() -> None:
                real(one, two, *args, **named)
                self._moved(name, one, two)

            return self.call(name, self.path_of(two) or self.path_of(one), act)

        return patched

    def _moved(self, name: str, one: Any, two: Any) -> None:
        new = self._in_disk(two)
        if new and self.disk:
            old = self._in_disk(one)
            self.disk.renamed(old, new) if old and name in ("rename", "replace") else self.disk.created(new)

    def renameat2(self, one: bytes, two: bytes, flags: int, real: Callable[[], int]) -> int:
        """The system's exchange of two names; its errors are returned as C does."""
        if not self.exchange:
            ctypes.set_errno(errno.ENOSYS)
            return -1

        def act() -> int:
            found = real()
            old, new = self._in_disk(one), self._in_disk(two)
            if not found and self.disk and old and new:
                self.disk.exchanged(old, new) if flags & 2 else self.disk.renamed(old, new)
            return found

        try:
            return self.call("renameat2", self.path_of(two), act)
        except OSError as error:
            ctypes.set_errno(error.errno or 0)
            return -1

    def _on_file(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def patched(file: Any, *args: Any, **named: Any) -> Any:
            if name == "close":
                return self._close(file)
            if name in FLUSHES:
                return self._flush(name, file)
            torn = None
            if name in ("write", "pwrite"):
                half = memoryview(args[0]).cast("B")[: max(1, memoryview(args[0]).nbytes // 2)]
                torn = lambda: real(file, half, *args[1:])  # noqa: E731
            elif name in ("read", "pread"):
                torn = lambda: real(file, max(1, args[0] // 2), *args[1:])  # noqa: E731
            return self.call(name, self.path_of(file), lambda: real(file, *args, **named), torn)

        return patched

    def _close(self, file: int) -> None:
        path = self.path_of(file)
        self._opened.discard(file)
        if self.dead:
            self.real["close"](file)
        self.call("close", path, lambda: self.real["close"](file))

    def _flush(self, name: str, file: Any) -> None:
        number = file if isinstance(file, int) else file.fileno()
        try:
            self.call(name, self.path_of(number), lambda: self.disk.synced(number) if self.disk else None)
        except OSError:
            if self.disk:
                self.disk.lose(number)
            raise

    def _os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        where, new = self.path_of(path, dir_fd), self._in_disk(path, dir_fd)
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

        def act() -> int:
            fresh = new and flags & os.O_CREAT and not self._there(new)
            file: int = self.real["open"](path, flags, mode, dir_fd=dir_fd)
            self._opened.add(file)
            if fresh and new and self.disk:
                self.disk.created(new)
            return file

        return self.call("open to write" if writes else "open to read", where, act)

    def _there(self, path: Path) -> bool:
        try:
            self.real["lstat"](path)
        except FileNotFoundError:
            return False
        return True

    def _io_open(self, file: Any, mode: str = "r", buffering: int = -1, *args: Any, **named: Any) -> Any:
        if not isinstance(file, int) and os.fsdecode(file) == BOOT:
            self.boots += 1
            raw = io.BytesIO(f"{self.boot}\n".encode())
            return raw if "b" in mode else io.TextIOWrapper(raw)
        if isinstance(file, int):
            self._opened.discard(file)
        if not self.path_of(file):
            return self.real["io.open"](file, mode, buffering, *args, **named)
        return _dressed(_File(file, mode.replace("b", "").replace("t", ""), self), mode, buffering, args, named)

    def _flock(self, file: Any, operation: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        self.call("flock", self.path_of(number), lambda: self.real["flock"](number, operation))


def _dressed(raw: _File, mode: str, buffering: int, args: Any, named: Any) -> Any:
    """What `open` makes of a raw file."""
    if buffering == 0:
        return raw
    both = io.BufferedRandom if "+" in mode else io.BufferedReader if raw.readable() else io.BufferedWriter
    buffered = both(raw)
    words = dict(zip(("encoding", "errors", "newline"), args, strict=False)) | named
    words.pop("closefd", None), words.pop("opener", None)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, **words)


class _File(io.FileIO):
    """A raw file whose calls are counted."""

    def __init__(self, file: Any, mode: str, layer: Layer) -> None:
        self.layer, self.where = layer, layer.path_of(file)
        opener = None if isinstance(file, int) else lambda path, flags: layer._os_open(path, flags, 0o666)
        super().__init__(file, mode, opener=opener)
        layer._opened.discard(self.fileno())

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        torn = lambda: super(_File, self).readinto(view[: max(1, len(view) // 2)])  # noqa: E731
        return self.layer.call("readinto", self.where, lambda: super(_File, self).readinto(view), torn)

    def readall(self) -> bytes:
        found, block = bytearray(), bytearray(1 << 16)
        while size := self.readinto(block):
            found += block[:size]
        return bytes(found)

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or size < 0:
            return self.readall()
        block = bytearray(size)
        return bytes(block[: self.readinto(block)])

    def write(self, data: Any, /) -> int:
        view = memoryview(data).cast("B")
        torn = lambda: super(_File, self).write(view[: max(1, len(view) // 2)])  # noqa: E731
        return self.layer.call("write", self.where, lambda: super(_File, self).write(view), torn)

    def close(self) -> None:
        if self.closed:
            return
        if Layer.active is not self.layer or self.layer.dead:
            super().close()
        else:
            self.layer.call("close", self.where, super().close)


class _Function:
    """A function of the C library that the active layer watches, wherever it was looked up."""

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "real", real)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __call__(self, one: int, old: bytes, two: int, new: bytes, flags: int) -> int:
        layer = Layer.active
        if layer is None:
            return int(self.real(one, old, two, new, flags))
        return layer.renameat2(old, new, flags, lambda: int(self.real(one, old, two, new, flags)))


class _Library:
    """The C library."""

    real = ctypes.CDLL

    def __init__(self, *args: Any, **named: Any) -> None:
        self._library = self.real(*args, **named)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        return _Function(found) if name == "renameat2" else found


def _mapping(layer: Layer) -> type[mmap.mmap]:
    real = mmap.mmap

    class Mapping(real):  # type: ignore[misc, valid-type]
        """A mapped file whose mapping and whose reading ahead are counted."""

        def __new__(cls, file: int, *args: Any, **named: Any) -> Any:
            where = layer.path_of(file)
            found = layer.call("mmap", where, lambda: real.__new__(cls, file, *args, **named))
            found.where = where
            return found

        def madvise(self, *args: Any) -> None:
            act = lambda: super(Mapping, self).madvise(*args)  # noqa: E731
            layer.call("madvise", self.where, act) if Layer.active is layer else act()

    return Mapping
