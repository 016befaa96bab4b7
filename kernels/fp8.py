"""FP8 weights (e4m3fn) with float32 scales per block, from and to raw bits of the float types of `casts`.

Two codes are looked up at once, in a table of 512 KiB: a gather costs the same for one value as for two. All work goes
through strips of rows that fit a core's cache, so temporary memory stays near 1 MiB however large the tensor is.
Tables of pairs read two bytes as one little-endian integer. A scale is used by its row's position: the first row of
every array here is the first row of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.kernels import casts, native
from transcoder.kernels.casts import Bits

Floats = NDArray[np.float32]
Codes = NDArray[np.uint8]
Block = tuple[int, int]

STRIP = 1 << 16
"""Elements worked on at once."""

CELLS: dict[str, Any] = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
"""The integer type that holds a float type's raw bits."""

_LARGEST = np.float32(448)
_SMALLEST = np.array(1, np.uint32).view(np.float32)


def to_float32(bits: Codes) -> Floats:
    """e4m3fn codes as float32 values; zeros and NaN keep their sign.

    >>> to_float32(np.array([0x38, 0x80, 0x7E], np.uint8))
    array([  1.,  -0., 448.], dtype=float32)
    """
    padded = np.zeros(bits.size + bits.size % 2, np.uint8)
    padded[: bits.size].reshape(bits.shape)[...] = bits
    pairs = _pairs().take(padded.view(np.uint16).astype(np.intp), mode="clip")
    return pairs.view(np.float32)[: bits.size].reshape(bits.shape)


def from_float32(values: Floats) -> Codes:
    """float32 values as e4m3fn codes, to nearest even; beyond 448 (infinity too) becomes 448, NaN stays NaN.

    >>> from_float32(np.array([1, -0.0, 1e9, 17.0], np.float32))
    array([ 56, 128, 126,  88], dtype=uint8)
    """
    bits = np.ascontiguousarray(values).view(np.uint32)
    codes = round_magnitude(values, mantissa=3, lowest=-6, largest=448.0)
    codes += (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # 448 is 0x7E and NaN 0x7F
    codes |= (bits >> np.uint32(24)) & np.uint32(0x80)
    return codes.astype(np.uint8).reshape(values.shape)


def decode(weight: Codes, scales: Floats, block: Block, target: str) -> Bits:
    """Codes times the scale of their block in float32, rounded once to `target`.

    weight: [n, k]; scales: [ceil(n / rows), ceil(k / columns)] of `block`; the last blocks may be partial.
    A single scale is [1, 1] with block (n, k). As in DeepSeek-V3's inference/kernel.py, weight_dequant.
    """
    out = np.empty(weight.shape, CELLS[target])
    if target == "bfloat16" and native.fp8_decode(weight, scales, block, out):
        return out
    for first, last in bands(weight.shape, block[0]):
        _decode_band(
            weight[first:last], scales[first // block[0] : -(-last // block[0])], block, target, out[first:last]
        )
    return out


def _decode_band(weight: Codes, scales: Floats, block: Block, target: str, out: Bits) -> None:
    """Decodes whole block rows into `out`."""
    factors, plain = spread(scales, block[1], weight.shape[1]), bool(np.isfinite(scales).all())
    for part in strips(weight.shape, block[0]):
        values = to_float32(weight[part])
        with np.errstate(all="ignore"):
            by_block_row(values, factors)[...] *= factors[:, None]
        round_into(values, target, out[part], plain)


def encode(bits: Bits, source: str, block: Block, kept: Floats | None) -> tuple[Codes, Floats]:
    """Codes [n, k] and scales per block such that decoding comes as near to `bits` as the scales allow.

    A block takes its scale from `kept` if that gives back the same bits for the whole block; so values that came from
    FP8 return exactly. Any other takes its largest finite magnitude / 448 (1 if that is zero), as DeepSeek-V3 does:
    infinities become the largest value of the block and NaN stays NaN.
    """
    rows, columns = block
    codes = np.empty(bits.shape, np.uint8)
    if kept is not None and source == "bfloat16" and native.fp8_encode(bits, kept, block, codes):
        return codes, kept.copy()
    scales = np.ones((-(-bits.shape[0] // rows), -(-bits.shape[1] // columns)), np.float32)
    for first, last in bands(bits.shape, rows):
        of = slice(first // rows, -(-last // rows))
        old = None if kept is None else kept[of]
        scales[of] = _encode_band(bits[first:last], source, block, old, codes[first:last])
    return codes, scales


def _encode_band(bits: Bits, source: str, block: Block, kept: Floats | None, out: Codes) -> Floats:
    """Encodes whole block rows into `out`; the scales used."""
    if kept is None:
        scales = _fresh(largest_finite(bits, source, block))
    else:
        _quantise(bits, source, block, kept, out)
        fits = same_blocks(out, bits, block, lambda codes: decode(codes, kept, block, source))
        if fits.all():
            return kept
        scales = np.where(fits, kept, _fresh(largest_finite(bits, source, block)))
    _quantise(bits, source, block, scales, out)
    return scales


def _quantise(bits: Bits, source: str, block: Block, scales: Floats, out: Codes) -> None:
    """The nearest codes under given scales; a zero scale leaves the values' signs."""
    factors = spread(np.where(scales == 0, np.copysign(np.float32(1), scales), scales), block[1], bits.shape[1])
    for part in strips(bits.shape, block[0]):
        values = casts.to_float32(bits[part], source)
        with np.errstate(all="ignore"):
            by_block_row(values, factors)[...] /= factors[:, None]
        out[part] = from_float32(values)


def _fresh(largest: Floats) -> Floats:
    """The scale under which the largest magnitude becomes 448."""
    with np.errstate(under="ignore"):
        scales = np.maximum(largest / _LARGEST, _SMALLEST)
    return np.where(largest == 0, np.float32(1), scales)


@cache
def _pairs() -> NDArray[np.uint64]:
    """Per two codes, the bits of two float32 values. A code's bits, moved up, are its value / 256 as a float16."""
    codes = np.arange(256, dtype=np.uint16)
    halves = ((codes & np.uint16(0x7F)) << np.uint16(7) | (codes & np.uint16(0x80)) << np.uint16(8)).view(np.float16)
    values = halves.astype(np.float32) * np.float32(256)
    values[[0x7F, 0xFF]] = np.array([0x7FC00000, 0xFFC00000], np.uint32).view(np.float32)
    return np.stack(np.broadcast_arrays(values, values[:, None]), axis=-1).reshape(-1).view(np.uint64)


def round_magnitude(values: Floats, mantissa: int, lowest: int, largest: float) -> NDArray[np.uint32]:
    """Magnitudes to the nearest code of a small float type, ties to even; NaN and all beyond become `largest`.

    mantissa: bits; lowest: the exponent of the smallest normal number. Adding a power of two so large that its last
    bit is the code's last bit lets the processor round.
    """
    size = np.ascontiguousarray(values).view(np.uint32) & np.uint32(0x7FFFFFFF)
    np.minimum(size, np.float32(largest).view(np.uint32), out=size)
    power = size & np.uint32(0x7F800000)
    np.maximum(power, np.uint32(lowest + 127 << 23), out=power)
    power += np.uint32(23 - mantissa << 23)
    np.add(size.view(np.float32), power.view(np.float32), out=size.view(np.float32))
    size -= power
    power >>= np.uint32(23 - mantissa)
    size += power
    size -= np.uint32(lowest + 127 + 23 - mantissa << mantissa)
    return size


def round_into(values: Floats, target: str, out: Bits, plain: bool) -> None:
    """float32 values into raw bits of `target`, to nearest even; overwrites `values`.

    plain: every NaN among them is one that a table or the processor made, so rounding can't carry into its sign.
    """
    if target != "bfloat16" or not plain:
        out[...] = casts.from_float32(values, target)
        return
    bits = values.view(np.uint32)
    odd = bits >> np.uint32(16)
    odd &= np.uint32(1)
    bits += odd
    bits += np.uint32(0x7FFF)
    bits >>= np.uint32(16)
    np.copyto(out, bits, casting="unsafe")


def bands(shape: tuple[int, ...], rows: int) -> Iterator[tuple[int, int]]:
    """Row ranges of whole block rows: as many as fill a strip, or one that needs several strips; then a partial one."""
    if 0 in shape:
        return
    step = max(rows, STRIP // shape[1] // rows * rows)
    whole = shape[0] - shape[0] % rows
    yield from ((first, min(first + step, whole)) for first in range(0, whole, step))
    if whole < shape[0]:
        yield whole, shape[0]


def strips(shape: tuple[int, ...], rows: int) -> Iterator[slice]:
    """The row ranges to work on at once in one band."""
    step = shape[0] if shape[0] > rows else max(1, STRIP // shape[1])
    return (slice(first, min(first + step, shape[0])) for first in range(0, shape[0], step))


def spread(scales: Floats, columns: int, width: int) -> Floats:
    """Scales per column block as scales per column."""
    return np.repeat(scales, min(columns, width), axis=1)[:, :width]


def by_block_row(values: NDArray[Any], factors: NDArray[Any]) -> NDArray[Any]:
    """A view of rows as [block rows, rows, columns]."""
    return values.reshape(len(factors), -1, values.shape[-1])


def largest_finite(bits: Bits, source: str, block: Block) -> Floats:
    """The largest finite magnitude in every block of a band."""
    starts, height = np.arange(0, bits.shape[1], block[1]), -(-len(bits) // block[0])
    found = np.zeros((height, len(starts)), np.float32)
    for part in strips(bits.shape, block[0]):
        values = np.abs(casts.to_float32(bits[part], source))
        values[~np.isfinite(values)] = 0
        highest = by_block_row(values, found).max(axis=1)
        np.maximum(found, np.maximum.reduceat(highest, starts, axis=1), out=found)
    return found


def same_blocks(
    codes: NDArray[Any], bits: Bits, block: Block, decoder: Callable[[NDArray[Any]], Bits]
) -> NDArray[np.bool_]:
    """Which blocks of a band decode to exactly these bits."""
    starts, height = np.arange(0, bits.shape[1], block[1]), -(-len(bits) // block[0])
    found = np.ones((height, len(starts)), np.bool_)
    for part in strips(bits.shape, block[0]):
        same = by_block_row(decoder(codes[part]) == bits[part], found).all(axis=1)
        found &= np.logical_and.reduceat(same, starts, axis=1)
    return found
