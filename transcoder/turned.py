"""Tensors whose matrices chunks hold transposed: moved matrix by matrix, where others are moved band by band.

A few rows of such a matrix are everywhere a few elements of a chunk: as many writes and checksums as it has columns.
What is digested stays the same, and in the same order. The journal marks only the ends of matrices that are ends of
leaves, too: as a rule that of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from math import prod

import numpy as np

from transcoder.atlas import Atlas
from transcoder.engine import Array, Fetch, bands, elements, gather, gather_for
from transcoder.kernels import strided
from transcoder.moves import Copy, runs
from transcoder.planner import HfTensor
from transcoder.spec import Box, DType
from transcoder.staging import staging

Range = tuple[int, int]  # flat elements [start, stop)


def strokes(atlas: Atlas, tensor: HfTensor, found: Iterable[Range]) -> list[Range]:
    """The ranges in which a tensor is best moved: `found`, its bands, or as many whole matrices as have room in one."""
    usual = list(found)
    matrix = prod(tensor.shape[-2:])
    if len(usual) < 2 or not any(copy.turned for _, _, copy in atlas.pieces(tensor, *usual[0])):
        return usual
    step = max(1, usual[0][1] // matrix) * matrix
    return [(start, min(start + step, usual[-1][1])) for start in range(0, usual[-1][1], step)]


def collected(
    atlas: Atlas, tensor: HfTensor, stroke: Range, dtype: DType, fetch: Fetch, offset: int, size: int
) -> Iterator[tuple[int, Array]]:
    """The first element and the values of every band of a stroke.

    They will be written from `offset` of a file on, `size` bytes an element, one before the next is asked for.
    """
    start, stop = stroke
    step = next(last for _, last in bands(tensor.shape, dtype))
    if stop - start <= step:
        yield start, gather_for(offset, atlas, tensor, start, stop, dtype, fetch)
        return
    held = Held(atlas, tensor, stroke, dtype, fetch)
    for first in range(start, stop, step):
        last = min(first + step, stop)
        place = staging((last - first) * dtype.size, offset + (first - start) * size, "band")
        yield first, held.gather(first, last, place.view(f"<u{dtype.size}"))


class Reader:
    """The elements of a tensor, range after range; a stroke is fetched when it is reached."""

    def __init__(self, atlas: Atlas, tensor: HfTensor, dtype: DType, fetch: Fetch) -> None:
        self._atlas, self._tensor, self._dtype, self._fetch = atlas, tensor, dtype, fetch
        usual = list(bands(tensor.shape, dtype))
        self._strokes = strokes(atlas, tensor, usual)
        self._edges = {edge for stroke in self._strokes for edge in stroke}
        self._turned = self._strokes != usual
        self._held: dict[Range, Held] = {}  # what lies in mapped files takes no memory

    def read(self, start: int, stop: int) -> Array:
        """The flat elements [start, stop)."""
        if not self._turned or {start, stop} <= self._edges:
            return gather(self._atlas, self._tensor, start, stop, self._dtype, self._fetch)
        near = [(first, last) for first, last in self._strokes if first < stop and start < last]
        return np.concatenate([self._part(stroke, start, stop) for stroke in near])

    def _part(self, stroke: Range, start: int, stop: int) -> Array:
        if stroke not in self._held:
            self._held[stroke] = Held(self._atlas, self._tensor, stroke, self._dtype, self._fetch)
        first, last = max(start, stroke[0]), min(stop, stroke[1])
        return self._held[stroke].gather(first, last, np.empty(last - first, f"<u{self._dtype.size}"))


class Held:
    """A stroke of a tensor, fetched from its chunks, each byte once; its bands are collected from what came."""

    def __init__(self, atlas: Atlas, tensor: HfTensor, stroke: Range, dtype: DType, fetch: Fetch) -> None:
        self._atlas, self._tensor, self._dtype = atlas, tensor, dtype
        self._ranges: dict[tuple[str, Box], list[tuple[int, Array]]] = {}
        for key, chunk, copy in atlas.pieces(tensor, *stroke):
            for run in runs(copy):
                data = fetch(key, chunk, run.chunk * dtype.size, run.count * dtype.size)
                self._ranges.setdefault((key, chunk.box), []).append((run.chunk, elements(data, dtype)))

    def gather(self, start: int, stop: int, band: Array) -> Array:
        """The flat elements [start, stop), in `band`."""
        for key, chunk, copy in self._atlas.pieces(self._tensor, start, stop):
            self._collect(self._ranges[key, chunk.box], copy, band)
        return band

    def _collect(self, ranges: list[tuple[int, Array]], copy: Copy, band: Array) -> None:
        last = copy.chunk + sum((size - 1) * step for size, step in zip(copy.shape, copy.chunk_steps, strict=True))
        for first, data in ranges:
            if first <= copy.chunk and last < first + data.size:
                held = strided.view(data, copy.chunk - first, copy.shape, copy.chunk_steps)
                strided.copy(strided.view(band, copy.hf, copy.shape, copy.hf_steps), held)
                return
        for part in copy.slices():  # what was fetched has gaps
            self._collect(ranges, part, band)
