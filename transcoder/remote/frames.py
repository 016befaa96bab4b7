"""An item of a `.distcp` object without its payload: what is parsed of it lies before and behind that."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator
from math import prod
from typing import TypeVar

from transcoder.formats.archive import tensor_item
from transcoder.paths import Extent
from transcoder.remote.files import RemoteFile
from transcoder.spec import DType

T = TypeVar("T")
Frame = tuple[Extent, int, int, DType, tuple[int, ...]]  # file, offset, length, and what the tensor is
MOST = 1 << 16  # bytes on either side of a payload
WINDOW = 16  # tensors whose frames are fetched ahead


def framed(view: Extent, offset: int, length: int, dtype: DType, shape: tuple[int, ...]) -> memoryview:
    """The item of `length` bytes at `offset`; of an object zeros, which take no memory, where the payload is."""
    if not isinstance(view, RemoteFile):
        return view[offset : offset + length]
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    whole = memoryview(mmap.mmap(-1, max(length, 1), flags=flags))[:length]
    for start, stop in edges(offset, length, dtype, shape):
        whole[start - offset : stop - offset] = view[start:stop]
    return whole


def edges(offset: int, length: int, dtype: DType, shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """Where the frame lies: exactly, if torch writes it so today, else as if all of it were on either side."""
    known, payload = tensor_item(dtype, shape), prod(shape) * dtype.size
    end = offset + length
    if known.length == length:
        behind = offset + known.payload_offset + payload
        return [(offset, offset + known.payload_offset), (behind, end)]
    around = min(max(0, length - payload), MOST)
    return [(offset, end)] if length <= 2 * around else [(offset, offset + around), (end - around, end)]


def ahead(keys: Iterable[T], frames: Iterable[list[Frame]]) -> Iterator[T]:
    """The keys, while what `framed` will read for those that follow is on its way; frames: its arguments for each."""
    coming, sent = iter(frames), 0
    for number, key in enumerate(keys):
        while sent <= number + WINDOW and (group := next(coming, None)) is not None:
            sent += 1
            for view, offset, length, dtype, shape in group:
                if isinstance(view, RemoteFile) and offset + length <= len(view):
                    view.ahead(edges(offset, length, dtype, shape))
        yield key
