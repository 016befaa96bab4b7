"""Casts between float types, to nearest even, on NumPy arrays of raw bits (bfloat16 as uint16)."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.kernels import native

Bits = NDArray[Any]
_INFINITY = {"bfloat16": 0x7F80, "float16": 0x7C00, "float32": 0x7F800000}  # its bits
_BITS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}


def cast(bits: Bits, source: str, target: str) -> Bits:
    """The elements of `bits` (raw bits of dtype `source`) as raw bits of dtype `target`.

    Exact when widening; rounds to nearest even when narrowing; NaN stays NaN. Raises KeyError for other dtypes.
    """
    if source == target:
        return bits
    return from_float32(to_float32(bits, source), target)


def add(bits: Bits, dtype: str, amount: float) -> Bits:
    """The elements of `bits` (raw bits of `dtype`) plus `amount`, rounded to nearest even."""
    return from_float32(to_float32(bits, dtype) + np.float32(amount), dtype)


def finite(bits: Bits, dtype: str) -> bool:
    """Whether raw bits hold neither NaN nor infinity: of either sign these are the largest, seen as integers.

    >>> finite(np.array([0x7F7F, 0xFF7F], np.uint16), "bfloat16"), finite(np.array([0, 0xFF80], np.uint16), "bfloat16")
    (True, False)
    """
    if dtype not in _INFINITY or not bits.size:
        return True
    first, sign = _INFINITY[dtype], 1 << 8 * bits.itemsize - 1
    found = native.finite(bits, first)
    if found is not None:
        return found
    return int(bits.view(f"<i{bits.itemsize}").max()) < first and int(bits.max()) < first + sign


def to_float32(bits: Bits, source: str) -> NDArray[np.float32]:
    """Raw bits as float32 values.

    >>> to_float32(np.array([0x3F80], np.uint16), "bfloat16")
    array([1.], dtype=float32)
    """
    if source == "bfloat16":
        return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return bits.view({"float16": np.float16, "float32": np.float32}[source]).astype(np.float32)


def from_float32(values: NDArray[np.float32], target: str) -> Bits:
    """float32 values as raw bits of `target`, rounded to nearest even."""
    if target != "bfloat16":
        with np.errstate(over="ignore"):
            return values.astype({"float16": np.float16, "float32": np.float32}[target]).view(_BITS[target])
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    quiet = (bits >> np.uint32(16)) | np.uint32(0x40)
    return np.where(np.isnan(values), quiet, rounded).astype(np.uint16)
