"""Elements of Megatron chunks that no Hugging Face tensor supplies: zeros are written there, and looked for."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from transcoder.atlas import Atlas
from transcoder.disk import PIECE
from transcoder.engine import Fetch, Sink
from transcoder.moves import runs
from transcoder.planner import Filler
from transcoder.spec import Chunk, DType


def fill(atlas: Atlas, filler: Filler, dtype: DType, sink: Sink) -> None:
    """Write zeros where no Hugging Face tensor supplies elements."""
    for chunk, start, size in filler_ranges(atlas, filler, dtype):
        sink(filler.key, chunk, start, zeros(size))


_ZEROS = memoryview(bytes(PIECE))


def zeros(size: int) -> memoryview:
    """That many zeros, at most a piece."""
    return _ZEROS[:size]


def holds_values(atlas: Atlas, filler: Filler, dtype: DType, fetch: Fetch) -> bool:
    """Whether filler holds something other than zeros; all of it is read."""
    found = False
    for chunk, start, size in filler_ranges(atlas, filler, dtype):
        found |= bool(np.any(np.frombuffer(fetch(filler.key, chunk, start, size), np.uint8)))
    return found


def filler_ranges(atlas: Atlas, filler: Filler, dtype: DType) -> Iterator[tuple[Chunk, int, int]]:
    """Chunk, first payload byte and count, at most a piece each."""
    for chunk, copy in atlas.fillers(filler):
        for run in runs(copy):
            first, nbytes = run.chunk * dtype.size, run.count * dtype.size
            for begin in range(0, nbytes, PIECE):
                yield chunk, first + begin, min(PIECE, nbytes - begin)
