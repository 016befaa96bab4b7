"""Reads ranges of files into parameter memory: straight where both sides are contiguous, else through one buffer."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product as combinations
from pathlib import Path
from typing import Any

import torch
from isal.isal_zlib import crc32

from transcoder.errors import Problem, refuse
from transcoder.moves import Copy, strides
from transcoder.paths import open_regular
from transcoder.runtime.shards import Shard
from transcoder.spec import Chunk, DType

BAND = 4 << 20  # bytes of the buffer
ROW = 512  # bytes: shorter rows are read with what lies between them
OPEN = 256  # files at once
LONG = 64 << 10  # bytes: shorter rows without gaps are read together


@dataclass(frozen=True)
class Filled:
    """What a load did: elements of this rank, bytes that were read, tensors of the source that the model leaves out."""

    parameters: int
    bytes_read: int
    left_out: tuple[str, ...] = ()


class Reader:
    """The payload files of a checkpoint. `bytes_read` counts what was asked of them."""

    def __init__(self, folder: Path, follow_links: bool, pinned: bool) -> None:
        self.bytes_read = 0
        self._folder, self._follow_links = folder, follow_links
        self._files: dict[str, Any] = {}
        self._buffer = torch.empty(BAND, dtype=torch.uint8, pin_memory=pinned)
        self._bytes = memoryview(self._buffer.numpy())

    def close(self) -> None:
        """Close every file."""
        while self._files:
            self._files.popitem()[1].close()

    def fill(self, shard: Shard, copy: Copy, file: str, offset: int, dtype: DType) -> None:
        """Do a copy into a shard. offset: bytes of the file before element 0 of the copy's other side."""
        gaps = in_rows(copy, -(-ROW // dtype.size)) and span(copy) > copy.count
        if gaps:
            self._announce(copy, file, offset, dtype)
        straight = gaps or not copy.shape or in_rows(copy, 1 if len(copy.shape) == 1 else LONG // dtype.size)
        if straight and shard.memory is not None and shard.dtype == dtype.name:
            for row in rows(copy):
                into = shard.memory[row.chunk * dtype.size : (row.chunk + row.count) * dtype.size]
                self._read(file, offset + row.hf * dtype.size, into)
            return
        limit = BAND // dtype.size
        for block in blocks(copy, limit, counted=gaps):
            values = self._rows(block, file, offset, dtype) if gaps else self._whole(block, file, offset, dtype)
            steps = tuple(strides(block.shape)) if gaps else block.hf_steps
            shard.put(replace(block, hf=0, hf_steps=steps), values)

    def _whole(self, block: Copy, file: str, offset: int, dtype: DType) -> Any:
        """All that a copy's other side spans."""
        size = span(block) * dtype.size
        self._read(file, offset + block.hf * dtype.size, self._bytes[:size])
        return self._buffer[:size].view(getattr(torch, dtype.name))

    def _rows(self, block: Copy, file: str, offset: int, dtype: DType) -> Any:
        """The rows of a copy's other side, one behind the other."""
        done = 0
        for row in rows(block):
            size = row.count * dtype.size
            self._read(file, offset + row.hf * dtype.size, self._bytes[done : done + size])
            done += size
        return self._buffer[:done].view(getattr(torch, dtype.name))

    def check(self, key: str, chunk: Chunk) -> None:
        """Read all of a chunk and compare its CRC-32. Raises InputError when it is damaged."""
        crc = 0
        for start in range(0, chunk.nbytes, BAND):
            part = self._bytes[: min(BAND, chunk.nbytes - start)]
            self._read(chunk.file, chunk.offset + start, part)
            crc = crc32(part, crc)
        if chunk.crc is not None and crc != chunk.crc:
            problem = Problem("", chunk.file, key, "", f"CRC-32 {chunk.crc:08x}", f"{crc:08x}", "copy the file again")
            raise refuse("checksum", "a payload does not have its recorded checksum", [problem])

    def _announce(self, copy: Copy, file: str, offset: int, dtype: DType) -> None:
        """Let the kernel fetch all that lies between the rows: small reads alone would wait for each of them."""
        os.posix_fadvise(
            self._file(file), offset + copy.hf * dtype.size, span(copy) * dtype.size, os.POSIX_FADV_WILLNEED
        )

    def _file(self, name: str) -> int:
        if name not in self._files:
            if len(self._files) >= OPEN:
                self._files.pop(next(iter(self._files))).close()
            try:
                self._files[name] = open_regular(self._folder / name, self._follow_links, self._folder)
            except (OSError, ValueError) as error:
                raise refuse("file", "a file cannot be read", [Problem(str(error), name)]) from error
        return int(self._files[name].fileno())

    def _read(self, file: str, offset: int, into: memoryview) -> None:
        self.bytes_read += len(into)
        while len(into):
            count = os.preadv(self._file(file), [into], offset)
            if not count:
                problem = Problem(file=file, expected=f"{len(into)} bytes at {offset}", found="the end of the file")
                raise refuse("truncated", "a file is shorter than its header says", [problem])
            into, offset = into[count:], offset + count


def span(copy: Copy) -> int:
    """Elements from the first to the last of the copy's other side.

    >>> span(Copy((2, 3), 0, (3, 1), 0, (10, 1)))
    13
    """
    return 1 + sum((size - 1) * step for size, step in zip(copy.shape, copy.hf_steps, strict=True))


def in_rows(copy: Copy, least: int) -> bool:
    """Whether a copy consists of contiguous rows of at least so many elements."""
    return bool(copy.shape) and copy.shape[-1] >= least and (copy.chunk_steps[-1], copy.hf_steps[-1]) == (1, 1)


def rows(copy: Copy) -> Iterator[Copy]:
    """The rows of a copy that consists of contiguous ones, or is a single element.

    >>> [part.hf for part in rows(Copy((2, 3), 0, (3, 1), 0, (10, 1)))]
    [0, 10]
    """
    for index in combinations(*(range(size) for size in copy.shape[:-1])):
        chunk = copy.chunk + sum(i * step for i, step in zip(index, copy.chunk_steps, strict=False))
        hf = copy.hf + sum(i * step for i, step in zip(index, copy.hf_steps, strict=False))
        yield Copy(copy.shape[-1:], chunk, copy.chunk_steps[-1:], hf, copy.hf_steps[-1:])


def blocks(copy: Copy, limit: int, counted: bool = False) -> Iterator[Copy]:
    """A copy in parts that span at most `limit` elements of the other side, or have so many.

    >>> [(part.chunk, part.shape) for part in blocks(Copy((5,), 0, (1,), 0, (1,)), 3)]
    [(0, (2,)), (2, (3,))]
    """
    if (copy.count if counted else span(copy)) <= limit:
        yield copy
        return
    axis = max(range(len(copy.shape)), key=lambda each: (copy.shape[each] - 1) * copy.hf_steps[each])
    half = copy.shape[axis] // 2
    chunk, hf = copy.chunk + half * copy.chunk_steps[axis], copy.hf + half * copy.hf_steps[axis]
    for size, start, other in ((half, copy.chunk, copy.hf), (copy.shape[axis] - half, chunk, hf)):
        shape = (*copy.shape[:axis], size, *copy.shape[axis + 1 :])
        yield from blocks(replace(copy, shape=shape, chunk=start, hf=other), limit, counted)
