"""The compiled loops of native.c for the cases that they cover; elsewhere, or without the library, NumPy does it all.

Every function looks at types, shapes and ranges before it calls, and tells whether it did the work. The library is
built with the package where there is a compiler; TRANSCODER_NATIVE=0 leaves it aside. Calls release the interpreter's
lock.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Mapping
from importlib.machinery import EXTENSION_SUFFIXES
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Shape = tuple[int, ...]
UNIT = 32  # values of an INT4 row that are decoded at once
_P, _N = ctypes.c_void_p, ctypes.c_size_t
_ARGUMENTS: Mapping[str, list[type]] = {
    "fp8_decode": [_P, _N, _N, _P, _N, _N, _P],
    "fp8_encode": [_P, _N, _N, _P, _N, _N, _P],
    "mxfp4_decode": [_P, _P, _N, _P, _P],
    "mxfp4_encode": [_P, _P, _N, _P],
    "int4_decode": [_P, _P, _N, _N, _P],
    "turn16": [_P, _P, _P, _N, _N],
    "turn32": [_P, _P, _P, _N, _N],
    "finite16": [_P, _N, ctypes.c_uint16],
    "finite32": [_P, _N, ctypes.c_uint32],
}


def load(folder: Path) -> ctypes.CDLL | None:
    """The library beside this module; None where it was not built, is not wanted or is not for this machine."""
    if os.environ.get("TRANSCODER_NATIVE") == "0":
        return None
    for path in (folder / f"_native{suffix}" for suffix in EXTENSION_SUFFIXES):
        try:
            library = ctypes.CDLL(str(path))
            for name, types in _ARGUMENTS.items():
                getattr(library, name).argtypes = types
        except (OSError, AttributeError):
            continue
        return library
    return None


LIBRARY = load(Path(__file__).parent)


def fp8_decode(codes: Array, scales: Array, block: tuple[int, int], out: Array) -> bool:
    """bfloat16 from codes [n, k] and scales per block, into `out`. Beyond 2^7 a scale times 2^120 is no number."""
    if LIBRARY is None or not _blocks(codes, scales, block, out) or not bool((np.abs(scales) < 128).all()):
        return False
    return _usual(codes, np.uint8) and _room(out, np.uint16) and _called("fp8_decode", codes, scales, block, out)


def fp8_encode(bits: Array, scales: Array, block: tuple[int, int], out: Array) -> bool:
    """Codes of bfloat16 [n, k] under given scales, into `out`; False unless they give back all of these bits.

    Under scales of this range every code has bits of its own, so what gives them back is what NumPy finds.
    """
    if LIBRARY is None or not _blocks(bits, scales, block, out):
        return False
    if not bool(((scales >= 2.0**-100) & (scales <= 64)).all()):
        return False
    return _usual(bits, np.uint16) and _room(out, np.uint8) and _called("fp8_encode", bits, scales, block, out)


def _called(name: str, source: Array, scales: Array, block: tuple[int, int], out: Array) -> bool:
    result = getattr(LIBRARY, name)(_at(source), *source.shape, _at(scales), *block, _at(out))
    return name == "fp8_decode" or bool(result)


def _blocks(source: Array, scales: Array, block: tuple[int, int], out: Array) -> bool:
    """Whether shapes fit one another; what is empty has no blocks."""
    if source.ndim != 2 or out.shape != source.shape or min(*source.shape, *block) < 1:
        return False
    across = tuple(-(-size // extent) for size, extent in zip(source.shape, block, strict=True))
    return scales.shape == across and _usual(scales, np.float32)


def mxfp4_decode(blocks: Array, scales: Array, table: Array, out: Array) -> bool:
    """16-bit values [G, 32] from blocks [G, 16] and scales [G], into `out`. table: two values per scale and byte."""
    groups = len(scales)
    shapes = blocks.shape == (groups, 16) and scales.ndim == 1 and out.shape == (groups, 32) and table.size == 1 << 16
    if LIBRARY is None or not shapes or not _usual(blocks, np.uint8) or not _usual(scales, np.uint8):
        return False
    if not _usual(table, np.uint32) or not _room(out, np.uint16):
        return False
    LIBRARY.mxfp4_decode(_at(blocks), _at(scales), groups, _at(table), _at(out))
    return True


def mxfp4_encode(bits: Array, scales: Array, out: Array) -> bool:
    """Blocks [G, 16] of bfloat16 [G, 32] under given scales [G], into `out`; False unless they give back these bits.

    Under scales of this range every magnitude is a normal number.
    """
    groups = len(scales)
    shapes = bits.shape == (groups, 32) and scales.ndim == 1 and out.shape == (groups, 16)
    if LIBRARY is None or not shapes or not groups or scales.min() < 2 or scales.max() > 252:
        return False
    if not _usual(bits, np.uint16) or not _usual(scales, np.uint8) or not _room(out, np.uint8):
        return False
    return bool(LIBRARY.mxfp4_encode(_at(bits), _at(scales), groups, _at(out)))


def int4_decode(packed: Array, scales: Array, columns: int, group: int, out: Array) -> bool:
    """bfloat16 [n, columns] from words [n, columns / 8] and float32 scales [n, columns / group], into `out`."""
    if LIBRARY is None or group < 1 or group % UNIT or columns % group or not np.isfinite(scales).all():
        return False
    rows = len(packed)
    if packed.shape != (rows, columns // 8) or scales.shape != (rows, columns // group) or out.shape != (rows, columns):
        return False
    if not _usual(packed, np.uint32) or not _usual(scales, np.float32) or not _room(out, np.uint16):
        return False
    LIBRARY.int4_decode(_at(packed), _at(scales), rows * columns // UNIT, group // UNIT, _at(out))
    return True


def turn(to: Array, source: Array) -> bool:
    """Copy a matrix into another one of the same shape, tile by tile; neither need be contiguous."""
    if LIBRARY is None or to.ndim != 2 or to.shape != source.shape or to.dtype != source.dtype:
        return False
    size = to.itemsize
    if size not in (2, 4) or not (to.flags.writeable and to.flags.aligned and source.flags.aligned):
        return False
    steps = (ctypes.c_ssize_t * 4)(*(stride // size for stride in (*to.strides, *source.strides)))
    getattr(LIBRARY, f"turn{8 * size}")(_at(to), _at(source), ctypes.byref(steps), *to.shape)
    return True


def finite(bits: Array, infinity: int) -> bool | None:
    """Whether no value holds all bits of `infinity`, the exponent's; None where that has to be found otherwise."""
    if LIBRARY is None or bits.itemsize not in (2, 4) or not _usual(bits, f"<u{bits.itemsize}"):
        return None
    return bool(getattr(LIBRARY, f"finite{8 * bits.itemsize}")(_at(bits), bits.size, infinity))


def _usual(array: Array, dtype: Any) -> bool:
    """Whether C can index it."""
    return array.dtype == dtype and array.flags.c_contiguous and array.flags.aligned


def _room(array: Array, dtype: Any) -> bool:
    """Whether C can fill it."""
    return _usual(array, dtype) and array.flags.writeable


def _at(array: Array) -> int:
    return int(array.ctypes.data)
