"""MXFP4 weights (two E2M1 values a byte, a power of two per 32) from and to raw bits of the float types of `casts`.

A value is a nibble's value times 2^(scale - 127), the low nibble first, as transformers' convert_moe_packed_tensors
computes it. Scale 255 is NaN, as the OCP Microscaling specification says, so its whole group is NaN with the nibbles'
signs (transformers multiplies by 2^128, which gives infinities and NaN there). Scale and byte together index one table
of value pairs: 256 KiB for 16-bit targets.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.kernels import casts, native
from transcoder.kernels.casts import Bits
from transcoder.kernels.fp8 import CELLS, STRIP, Codes, Floats, round_magnitude

GROUP = 32
"""Values that share a scale."""

_STEP = STRIP // GROUP
_NAN = 255
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def decode(blocks: Codes, scales: Codes, target: str) -> Bits:
    """Raw bits [..., G * 32] of `target` from blocks [..., G, 16] and scales [..., G].

    >>> decode(np.full((1, 16), 0xA1, np.uint8), np.array([128], np.uint8), "float32").view(np.float32)[:2]
    array([ 1., -2.], dtype=float32)
    """
    flat, flat_scales = blocks.reshape(-1, GROUP // 2), scales.reshape(-1)
    out = np.empty((len(flat), GROUP), CELLS[target])
    done = native.mxfp4_decode(flat, flat_scales, _pairs(target), out)
    for first in range(0, 0 if done else len(flat), _STEP):
        part = slice(first, first + _STEP)
        index = np.repeat(flat_scales[part].astype(np.uint16) << np.uint16(8), GROUP // 2).reshape(-1, GROUP // 2)
        index |= flat[part]
        _pairs(target).take(index.astype(np.intp), out=out[part].view(_pairs(target).dtype), mode="clip")
    return out.reshape(*scales.shape[:-1], scales.shape[-1] * GROUP)


def encode(bits: Bits, source: str, kept: Codes | None) -> tuple[Codes, Codes]:
    """Blocks [..., G, 16] and scales [..., G] that decode as near to bits [..., G * 32] as the scales allow.

    A group takes its scale from `kept` if that gives back the same bits for the whole group. Any other takes the
    largest finite magnitude's exponent - 2, as OCP's conversion does, with nearest-even rounding; magnitudes beyond 6,
    infinity too, become 6. All zeros take scale 127; a group with a NaN takes 255, and becomes NaN.
    """
    shape = (*bits.shape[:-1], bits.shape[-1] // GROUP)
    flat, old = bits.reshape(-1, GROUP), None if kept is None else kept.reshape(-1)
    blocks, scales = np.empty((len(flat), GROUP // 2), np.uint8), np.empty(len(flat), np.uint8)
    if old is not None and source == "bfloat16" and native.mxfp4_encode(flat, old, blocks):
        return blocks.reshape(*shape, GROUP // 2), old.reshape(shape).copy()
    for first in range(0, len(flat), _STEP):
        part = slice(first, first + _STEP)
        blocks[part], scales[part] = _encode_strip(flat[part], source, None if old is None else old[part])
    return blocks.reshape(*shape, GROUP // 2), scales.reshape(shape)


def _encode_strip(bits: Bits, source: str, kept: Codes | None) -> tuple[Codes, Codes]:
    """Blocks and scales of groups [g, 32]."""
    values = casts.to_float32(bits, source)
    if kept is None:
        scales = _fresh(values)
        return _quantise(values, scales), scales
    blocks = _quantise(values, kept)
    fits = (decode(blocks, kept[:, None], source) == bits).all(axis=1)
    if fits.all():
        return blocks, kept
    scales = np.where(fits, kept, _fresh(values))
    return _quantise(values, scales), scales


def _quantise(values: Floats, scales: Codes) -> Codes:
    """The nearest nibbles under given scales, two a byte."""
    with np.errstate(all="ignore"):
        scaled = values / _powers()[scales][:, None]
    nibbles = round_magnitude(scaled, mantissa=1, lowest=0, largest=6.0)
    nibbles |= (scaled.view(np.uint32) >> np.uint32(28)) & np.uint32(8)
    pairs = nibbles.astype(np.uint8).view(np.uint16)
    return (pairs | pairs >> np.uint16(4)).astype(np.uint8)


def _fresh(values: Floats) -> Codes:
    """A scale per group, from its largest finite magnitude."""
    finite = np.isfinite(values)
    largest = np.where(finite, np.abs(values), np.float32(0)).max(axis=1)
    exponents = np.frexp(largest)[1] - 1  # frexp's fraction lies in [0.5, 1)
    scales = np.where(largest == 0, 127, np.maximum(exponents - 2 + 127, 0))
    return np.where(np.isnan(values).any(axis=1), _NAN, scales).astype(np.uint8)


@cache
def _powers() -> Floats:
    """What each scale multiplies by; exact, also where it is subnormal. For the NaN scale any number will do."""
    powers: Floats = np.ldexp(np.float32(1), np.arange(-127, 129).clip(max=127)).astype(np.float32)
    return powers


@cache
def _pairs(target: str) -> NDArray[Any]:
    """Per scale and byte, the bits of two values of `target`."""
    values = np.array([*_MAGNITUDES, *(-each for each in _MAGNITUDES)], np.float32)
    with np.errstate(over="ignore", under="ignore"):
        scaled = values * _powers()[:, None]
    scaled[_NAN] = np.copysign(np.float32(np.nan), values)
    cells = casts.from_float32(scaled, target)
    low, high = np.broadcast_arrays(cells[:, None, :], cells[:, :, None])
    return np.stack([low, high], axis=-1).reshape(-1).view(np.uint32 if cells.itemsize == 2 else np.uint64)
