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
import stat
import threading
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from fault_kinds import FLUSHES, Call, Crash, Fault
from fault_wraps import File, Library, dressed, mapping
from power import Disk

T = TypeVar("T")
BOOT = "/proc/sys/kernel/random/boot_id"
REMOVALS = ("unlink", "remove", "rmdir")
ONE_PATH: tuple[str, ...] = ("mkdir", "stat", "lstat", "listdir", "scandir", "readlink", "access", *REMOVALS)
ONE_PATH += ("statvfs", "chmod", "utime", "truncate")
TWO_PATHS = ("rename", "replace", "symlink", "link")
ON_FILES: tuple[str, ...] = ("write", "pwrite", "read", "pread", "posix_fallocate", "ftruncate", "fstat", "close")
ON_FILES += ("posix_fadvise", "fchmod", *sorted(FLUSHES))


class Layer:
    """Patches the calls while it is entered. roots: folders whose calls count. disk: the one that may lose data."""

    active: Layer | None = None

    def __init__(
        self, roots: Iterable[Path], fault: Fault | None = None, *, disk: Disk | None = None, **how: Any
    ) -> None:
        self.roots = tuple(os.path.realpath(root) for root in roots)
        self.fault, self.calls, self.disk = fault or Fault(), list[Call](), disk
        self.hit: Call | None = None  # what failed
        self.boot: str = how.get("boot", "first start")
        self.exchange: bool = how.get("exchange", True)
        self.dead, self.boots, self.opened = False, 0, set[int]()
        self._lock, self._undo = threading.RLock(), list[tuple[Any, str, Any]]()

    @property
    def entered(self) -> bool:
        """Whether calls come here."""
        return Layer.active is self

    def __enter__(self) -> Layer:
        assert Layer.active is None
        Layer.active = self
        self.real = {name: getattr(os, name) for name in (*ONE_PATH, *ON_FILES, *TWO_PATHS, "open")}
        self.real |= {"io.open": io.open, "flock": fcntl.flock}
        for names, patched in ((ONE_PATH, self._one_path), (ON_FILES, self._on_file), (TWO_PATHS, self._two_paths)):
            for name in names:
                self._patch(os, name, patched(name))
        self._patch(os, "open", self.os_open)
        self._patch(io, "open", self._io_open)
        self._patch(builtins, "open", self._io_open)
        self._patch(fcntl, "flock", self._flock)
        self._patch(mmap, "mmap", mapping(self))
        self._patch(ctypes, "CDLL", Library)
        return self

    def __exit__(self, *_: object) -> None:
        while self._undo:
            setattr(*self._undo.pop())
        Layer.active = None
        while self.opened:
            self.real["close"](self.opened.pop())

    def _patch(self, owner: Any, name: str, new: Any) -> None:
        self._undo.append((owner, name, getattr(owner, name)))
        setattr(owner, name, new)

    def path_of(self, place: Any, folder: int | None = None) -> str:
        """The absolute path that an argument means, "" when it is not below the roots."""
        above = Path(self._of_file(folder)) if folder is not None else Path.cwd()
        found = self._of_file(place) if isinstance(place, int) else os.path.normpath(above / os.fsdecode(place))
        return found if any(found == root or found.startswith(f"{root}/") for root in self.roots) else ""

    def _of_file(self, file: int) -> str:
        try:
            return str(self.real["readlink"](f"/proc/self/fd/{file}")).removesuffix(" (deleted)")
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
            return self.call(
                name, self.path_of(path, named.get("dir_fd")), lambda: self._noted(name, real, path, args, named)
            )

        return patched

    def _noted(self, name: str, real: Callable[..., Any], path: Any, args: Any, named: Any) -> Any:
        where = self._in_disk(path, named.get("dir_fd")) if name in ("mkdir", *REMOVALS) else None
        if where and self.disk and name in REMOVALS and self.disk.bury(where):
            return self.disk.removed(where)
        found = real(path, *args, **named)
        if where and self.disk and name == "mkdir":
            self.disk.created(where)
        return found

    def _in_disk(self, path: Any, folder: int | None = None) -> Path | None:
        """The path as the model knows it, if it is in the folder that may lose data."""
        text = self.path_of(path, folder)
        return Path(text) if text and self.disk and f"{text}/".startswith(f"{self.disk.top}/") else None

    def _two_paths(self, name: str) -> Callable[..., Any]:
        real = self.real[name]

        def patched(one: Any, two: Any, *args: Any, **named: Any) -> Any:
            def act() -> None:
                gone = self._in_disk(two) if name in ("rename", "replace") else None
                if gone and self.disk and self._there(gone) and not self._clashes(one, gone):
                    self.disk.bury(gone)
                real(one, two, *args, **named)
                self._moved(name, one, two)

            return self.call(name, self.path_of(two) or self.path_of(one), act)

        return patched

    def _clashes(self, one: Any, two: Path) -> bool:
        """Whether the system does not rename over this: a folder over a file, or the reverse."""
        return stat.S_ISDIR(self.real["lstat"](one).st_mode) != stat.S_ISDIR(self.real["lstat"](two).st_mode)

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
        self.opened.discard(file)
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

    def os_open(self, path: Any, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        """`os.open`; what is left open by the dead is closed at the end."""
        where, new = self.path_of(path, dir_fd), self._in_disk(path, dir_fd)
        writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))

        def act() -> int:
            fresh = new and flags & os.O_CREAT and not self._there(new)
            file: int = self.real["open"](path, flags, mode, dir_fd=dir_fd)
            self.opened.add(file)
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
            self.opened.discard(file)
        if not self.path_of(file):
            return self.real["io.open"](file, mode, buffering, *args, **named)
        return dressed(File(file, mode.replace("b", "").replace("t", ""), self), mode, buffering, args, named)

    def _flock(self, file: Any, operation: int) -> None:
        number = file if isinstance(file, int) else file.fileno()
        self.call("flock", self.path_of(number), lambda: self.real["flock"](number, operation))
