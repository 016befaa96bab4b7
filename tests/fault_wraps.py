"""Files, maps and functions of the C library that report to the fault layer under which they were made."""

from __future__ import annotations

import ctypes
import io
import mmap
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from faults import Layer


def dressed(raw: File, mode: str, buffering: int, args: Any, named: Any) -> Any:
    """What `open` makes of a raw file."""
    if buffering == 0:
        return raw
    both = io.BufferedRandom if "+" in mode else io.BufferedReader if raw.readable() else io.BufferedWriter
    buffered = both(raw)
    words = dict(zip(("encoding", "errors", "newline"), args, strict=False)) | named
    words.pop("closefd", None), words.pop("opener", None)
    return buffered if "b" in mode else io.TextIOWrapper(buffered, **words)


class File(io.FileIO):
    """A raw file whose calls are counted."""

    def __init__(self, file: Any, mode: str, layer: Layer) -> None:
        self.layer, self.where = layer, layer.path_of(file)
        opener = None if isinstance(file, int) else lambda path, flags: layer.os_open(path, flags, 0o666)
        super().__init__(file, mode, opener=opener)
        layer.opened.discard(self.fileno())

    def readinto(self, buffer: Any, /) -> int:
        view = memoryview(buffer).cast("B")
        torn = lambda: super(File, self).readinto(view[: max(1, len(view) // 2)])  # noqa: E731
        return self.layer.call("readinto", self.where, lambda: super(File, self).readinto(view), torn)

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
        torn = lambda: super(File, self).write(view[: max(1, len(view) // 2)])  # noqa: E731
        return self.layer.call("write", self.where, lambda: super(File, self).write(view), torn)

    def close(self) -> None:
        if self.closed:
            return
        if not self.layer.entered or self.layer.dead:
            super().close()
        else:
            self.layer.call("close", self.where, super().close)


class Function:
    """A function of the C library that the active layer watches, wherever it was looked up."""

    real: Any

    def __init__(self, real: Any) -> None:
        object.__setattr__(self, "real", real)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.real, name, value)

    def __call__(self, one: int, old: bytes, two: int, new: bytes, flags: int) -> int:
        from faults import Layer

        layer = Layer.active
        if layer is None:
            return int(self.real(one, old, two, new, flags))
        return layer.renameat2(old, new, flags, lambda: int(self.real(one, old, two, new, flags)))


class Library:
    """The C library."""

    real = ctypes.CDLL

    def __init__(self, *args: Any, **named: Any) -> None:
        self._library = self.real(*args, **named)

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._library, name)
        return Function(found) if name == "renameat2" else found


def mapping(layer: Layer) -> type[mmap.mmap]:
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
            layer.call("madvise", self.where, act) if layer.entered else act()

    return Mapping
