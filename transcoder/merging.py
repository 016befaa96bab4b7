"""Adapters merged into weights while these stream by: W + scale · B · A in float32, rounded once.

A band of a weight needs its own rows of B and all of A. DoRA gives every row the length that it was trained to have.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from transcoder.engine import Array, converted, stored
from transcoder.formats.peft import WEIGHTS
from transcoder.kernels.casts import from_float32, to_float32
from transcoder.paths import map_file
from transcoder.planner import HfTensor
from transcoder.spec import DType, TensorSpec
from transcoder.updates import Merge, Update

PIECE = 1 << 18  # elements that are in float32 at once
Floats = NDArray[np.float32]


class Merger:
    """Applies what is to be merged to bands of weights."""

    def __init__(self, merge: Merge) -> None:
        self._merge = merge
        paths = [path for path in merge.files if path.name == WEIGHTS]
        self._views = {path.name: map_file(path, merge.follow_links) for path in paths}

    def converted(self, tensor: HfTensor, start: int, band: Array, source: DType, target: DType) -> Array:
        """The elements of `band` (raw bits of `source`, from the flat element `start` of a weight on) in `target`.

        Whole rows, where the weight has an update. Raises InputError when no cast exists.
        """
        whole, update = self._merge.whole.get(tensor.name), self._merge.updates.get(tensor.name)
        if whole is not None:
            band, source = stored(self._views, whole, start, start + band.size), whole.dtype
        if update is None:
            return converted(band, source, target)
        width = tensor.shape[-1]
        lines = self._merged(update, tensor.shape, start // width, band.reshape(-1, width), source, target)
        return lines.reshape(-1)

    def _merged(
        self, update: Update, shape: tuple[int, ...], row: int, lines: Array, source: DType, target: DType
    ) -> Array:
        """Rows of a weight, seen as a matrix, from `row` on."""
        found = np.empty(lines.shape, f"<u{target.size}")
        right: dict[int, Floats] = {}
        for first, last in _pieces(row, len(lines), shape):
            further, line = divmod(row + first, shape[-2])
            expert = update.expert + further
            if expert not in right:
                right = {expert: self._right(update, expert)}
            change = self._left(update, expert, update.row + line, last - first) @ right[expert]
            values = to_float32(lines[first:last], source.name) + change * np.float32(update.scale)
            found[first:last] = from_float32(self._lengthened(update, line, values), target.name)
        return found

    def _lengthened(self, update: Update, row: int, values: Floats) -> Floats:
        """DoRA's rows with the lengths that were trained."""
        if update.magnitude is None:
            return values
        length = _floats(self._bits(update.magnitude, row, row + len(values)), update.magnitude)
        found: Floats = values * (length / np.linalg.norm(values, axis=1))[:, None]
        return found

    def _left(self, update: Update, expert: int, first: int, count: int) -> Floats:
        """What belongs to some rows of one expert's matrix: columns of A, where these are its rows, else rows of B."""
        if update.turned:
            return _floats(self._a(update, expert)[:, first : first + count], update.a).T
        width = update.b.shape[1]
        rows = self._bits(update.b, first * width, (first + count) * width).reshape(count, width)
        return _floats(rows[:, expert :: update.experts], update.b)

    def _right(self, update: Update, expert: int) -> Floats:
        """What all rows of one expert's matrix share."""
        if not update.turned:
            return _floats(self._a(update, expert), update.a)
        return _floats(self._bits(update.b).reshape(update.b.shape)[:, expert :: update.experts], update.b).T

    def _a(self, update: Update, expert: int) -> Array:
        rank, inner = update.rank, update.a.shape[1]
        return self._bits(update.a, expert * rank * inner, (expert + 1) * rank * inner).reshape(rank, inner)

    def _bits(self, spec: TensorSpec, start: int = 0, stop: int | None = None) -> Array:
        end = spec.nbytes // spec.dtype.size if stop is None else stop
        return stored(self._views, spec, start, end)


def _pieces(row: int, count: int, shape: tuple[int, ...]) -> Iterator[tuple[int, int]]:
    """Parts of `count` rows from `row` on, none with rows of two experts."""
    step, first = max(1, PIECE // max(1, shape[-1])), 0
    while first < count:
        last = min(count, first + step, first + shape[-2] - (row + first) % shape[-2])
        yield first, last
        first = last


def _floats(bits: Array, spec: TensorSpec) -> Floats:
    return to_float32(np.ascontiguousarray(bits), spec.dtype.name)
