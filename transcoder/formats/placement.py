"""What an output format makes of tensors that are cut into boxes: a place for every byte, and what is written last.

A format is a `Placement` (pure: no I/O) whose writer stores payload ranges in any order and whose index makes the files
a checkpoint. It knows nothing of recipes and grids.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from transcoder.spec import Box, Chunk, DType, TensorSpec

SETS = 2  # of files, each written by one worker


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor to store: its chunks as (box, rank, order), order being the place in the file (the layer)."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[tuple[Box, int, int], ...]


class Writer(Protocol):
    """Stores payload ranges in any order, from any thread."""

    def prepare(self) -> None:
        """Make room for every file. Raises OSError when the disk is full."""

    def write(self, key: str, chunk: Chunk, start: int, data: memoryview) -> int:
        """Store payload bytes [start, start + len(data)) of a chunk, each byte exactly once. Returns their CRC-32."""

    def passed(self, key: str, chunk: Chunk, start: int, count: int, crc: int) -> None:
        """Payload bytes with this CRC-32 are in their place."""

    def sync(self) -> None:
        """Make everything written durable. Raises OSError."""

    def finish(self) -> dict[str, str]:
        """The CRC-32 of every file, as a manifest has it. Raises RuntimeError if a chunk is incomplete."""

    def close(self) -> None:
        """Release the file descriptors."""


@dataclass(frozen=True)
class Placement(ABC):
    """Every chunk with its file and offset, every payload file with its size and set, and the objects' keys."""

    form: ClassVar[str]
    catalog: Mapping[str, TensorSpec]
    sizes: Mapping[str, int]
    sets: Mapping[str, int]
    objects: tuple[str, ...]

    @abstractmethod
    def writer(self, folder: Path, flush: bool) -> Writer:
        """What writes the payload files into `folder`. flush: send what is complete to disk at once."""

    @abstractmethod
    def index(self) -> Mapping[str, bytes | memoryview]:
        """The files that say what the payload files hold, in the order of writing; `metadata.json` is the last."""

    @abstractmethod
    def confirm(self, folder: Path) -> None:
        """Let another reader open what was written. Raises RuntimeError when it sees something else."""


def balance(sizes: Mapping[str, int], count: int) -> dict[str, int]:
    """Each name to one of `count` sets: in order, always to the set with the fewest bytes.

    >>> balance({"a": 3, "b": 1, "c": 1}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    totals, found = [0] * count, {}
    for name, size in sizes.items():
        found[name] = totals.index(min(totals))
        totals[found[name]] += size
    return found
