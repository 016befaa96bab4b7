"""Copies between flat memory and strided views of it; where the order of axes changes, tile by tile."""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import as_strided
from numpy.typing import NDArray

from transcoder.kernels import native

Array = NDArray[Any]
Shape = tuple[int, ...]
SIDE = 256
"""Rows and columns that NumPy copies at once; both sides of a tile fit the second cache."""

_SMALL = 4096  # elements; below, looking at the axes takes longer than a bad order


def view(flat: Array, first: int, shape: Shape, steps: Shape) -> Array:
    """The elements `first + sum(i * steps)` of a flat array for i over `shape`. Raises ValueError beyond its ends.

    >>> view(np.arange(6), 1, (2, 2), (1, 3)).tolist()
    [[1, 4], [2, 5]]
    """
    last = first + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
    if first < 0 or last >= flat.size or min((*shape, *steps), default=1) < 0:
        raise ValueError(f"elements {first} to {last} of {flat.size}")
    return as_strided(flat[first:], shape, tuple(step * flat.itemsize for step in steps))


def copy(to: Array, source: Array) -> None:
    """to[...] = source; both may be strided views of the same shape."""
    if to.ndim < 2 or to.size < _SMALL:
        to[...] = source
        return
    row, column = _nearest(source), _nearest(to)
    if row == column:
        to[...] = source
        return
    order = [axis for axis in range(to.ndim) if axis not in (row, column)]
    to, source = to.transpose(*order, row, column), source.transpose(*order, row, column)
    for index in np.ndindex(to.shape[:-2]):
        if not native.turn(to[index], source[index]):
            _turn(to[index], source[index])


def _nearest(array: Array) -> int:
    """The axis whose elements lie closest."""
    return min((abs(step), axis) for axis, step in enumerate(array.strides) if array.shape[axis] > 1)[1]


def _turn(to: Array, source: Array) -> None:
    """Copy a matrix whose rows lie closest in `source`, columns in `to`."""
    for row, column in product(*(range(0, size, SIDE) for size in to.shape)):
        tile = np.s_[row : row + SIDE, column : column + SIDE]
        to[tile] = np.ascontiguousarray(source[tile].T).T
