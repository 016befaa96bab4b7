"""INT4 weights of compressed-tensors, format "pack-quantized", symmetric, from and to raw bits of floats.

A 32-bit word holds eight values + 8, the lowest bits first; rows are padded to whole words with zero bits. A value is
the integer times the scale of its group of columns. Layout and the rule for new scales as in compressed-tensors:
compressors/pack_quantized and quantization/utils/helpers.py, calculate_qparams.
"""

from __future__ import annotations

from functools import cache

import numpy as np
from numpy.typing import NDArray

from transcoder.kernels import casts, native
from transcoder.kernels.casts import Bits
from transcoder.kernels.fp8 import CELLS, STRIP, Floats, largest_finite, round_into, same_blocks, spread

Words = NDArray[np.uint32]
_PER_WORD = 8
_EPSILON = {"bfloat16": 2.0**-7, "float16": 2.0**-10, "float32": 2.0**-23}
_LARGEST = {"bfloat16": 3.3895314e38, "float16": 65504.0, "float32": 3.4028235e38}


def decode(packed: Words, scales: Bits, scale_dtype: str, columns: int, group: int, target: str) -> Bits:
    """Raw bits [n, columns] of `target`: integers times scales in float32, rounded once.

    packed: [n, ceil(columns / 8)]; scales: [n, ceil(columns / group)], raw bits of `scale_dtype`.

    >>> decode(np.array([[0x7F]], np.uint32), np.array([[0.5]], np.float16), "float16", 2, 32, "float32").view("f4")
    array([[ 3.5, -0.5]], dtype=float32)
    """
    out, step = np.empty((len(packed), columns), CELLS[target]), _rows(columns)
    if target == "bfloat16" and native.int4_decode(packed, casts.to_float32(scales, scale_dtype), columns, group, out):
        return out
    for first in range(0, len(packed), step):
        part = slice(first, first + step)
        factors = casts.to_float32(scales[part], scale_dtype)
        with np.errstate(all="ignore"):
            values = _integers(packed[part])[:, :columns] * spread(factors, group, columns)
        round_into(values, target, out[part], bool(np.isfinite(factors).all()))
    return out


def encode(bits: Bits, source: str, group: int, kept: Bits | None, scale_dtype: str) -> tuple[Words, Bits]:
    """Words [n, ceil(k / 8)] and scales of `scale_dtype` that decode as near to bits [n, k] as the scales allow.

    A group takes its scale from `kept` if that gives back the same bits for the whole group. Any other takes its
    largest finite magnitude / 7.5, or the scale type's epsilon where that is zero, as compressed-tensors does;
    infinities become the largest value, and a group with a NaN takes a NaN scale.
    """
    count, columns = bits.shape
    packed = np.empty((count, -(-columns // _PER_WORD)), np.uint32)
    scales = np.empty((count, -(-columns // group)), CELLS[scale_dtype])
    for first in range(0, count if columns else 0, _rows(columns)):
        part = slice(first, first + _rows(columns))
        old = None if kept is None else kept[part].view(scales.dtype)
        packed[part], scales[part] = _encode_strip(bits[part], source, group, old, scale_dtype)
    return packed, scales


def _encode_strip(bits: Bits, source: str, group: int, kept: Bits | None, scale_dtype: str) -> tuple[Words, Bits]:
    """Words and scales of some rows."""
    values = casts.to_float32(bits, source)
    if kept is None:
        scales = _fresh(bits, source, group, scale_dtype)
        return _quantise(values, scales, scale_dtype, group, source), scales
    packed = _quantise(values, kept, scale_dtype, group, source)

    def decoder(words: Words) -> Bits:
        return decode(words, kept, scale_dtype, bits.shape[1], group, source)

    fits = same_blocks(packed, bits, (1, group), decoder)
    if fits.all():
        return packed, kept
    scales = np.where(fits, kept, _fresh(bits, source, group, scale_dtype))
    return _quantise(values, scales, scale_dtype, group, source), scales


def _quantise(values: Floats, scales: Bits, scale_dtype: str, group: int, source: str) -> Words:
    """The nearest integers under given scales, packed; -0 is a negative integer where the scale makes that vanish."""
    factors = casts.to_float32(scales, scale_dtype)
    vanishes = casts.to_float32(casts.from_float32(-factors, source), source) == 0
    divisors = np.where(factors == 0, np.float32(1), factors)
    with np.errstate(all="ignore"):
        integers = np.rint(values / spread(divisors, group, values.shape[1])).clip(-8, 7)
    np.nan_to_num(integers, copy=False)
    if vanishes.any():
        integers -= spread(vanishes, group, values.shape[1]) & np.signbit(values) & (integers == 0)
    return _pack(integers.astype(np.int8))


def _pack(integers: NDArray[np.int8]) -> Words:
    """Integers [n, k] as words."""
    count, columns = integers.shape
    nibbles = np.zeros((count, -(-columns // _PER_WORD) * _PER_WORD), np.uint8)
    nibbles[:, :columns] = integers.view(np.uint8) + np.uint8(8)
    pairs = nibbles.view(np.uint16)
    return (pairs | pairs >> np.uint16(4)).astype(np.uint8).view(np.uint32)


def _integers(packed: Words) -> Floats:
    """Words [n, w] as float32 integers [n, 8 w]."""
    index = np.ascontiguousarray(packed).view(np.uint8).astype(np.intp)
    return _pairs().take(index, mode="clip").view(np.float32)


def _fresh(bits: Bits, source: str, group: int, scale_dtype: str) -> Bits:
    """A scale per group, from its largest finite magnitude."""
    columns, starts = bits.shape[1], np.arange(0, bits.shape[1], group)
    scales = np.minimum(largest_finite(bits, source, (1, group)) / np.float32(7.5), np.float32(_LARGEST[scale_dtype]))
    rounded = casts.to_float32(casts.from_float32(scales, scale_dtype), scale_dtype)
    missing = np.isnan(casts.to_float32(bits, source).reshape(-1, columns))
    rounded = np.where(rounded == 0, np.float32(_EPSILON[scale_dtype]), rounded)
    rounded = np.where(np.logical_or.reduceat(missing, starts, axis=1), np.float32(np.nan), rounded)
    return casts.from_float32(rounded, scale_dtype)


def _rows(columns: int) -> int:
    """How many rows to work on at once."""
    return max(1, STRIP // max(1, columns))


@cache
def _pairs() -> NDArray[np.uint64]:
    """Per byte, the bits of two float32 integers."""
    values = np.arange(-8, 8).astype(np.float32)
    return np.stack(np.broadcast_arrays(values, values[:, None]), axis=-1).reshape(-1).view(np.uint64)
