"""What a checkpoint contains, as plain values: tensors, their chunks, and the names of dtypes in each format."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod

Box = tuple[tuple[int, int], ...]  # per dimension (start, stop), in elements


@dataclass(frozen=True, slots=True)
class DType:
    """An element type: bytes per element, its safetensors name and its torch storage class."""

    name: str
    size: int
    safetensors: str
    storage: str


# Names as in safetensors/src/tensor.rs and torch/storage.py; both little-endian.
_TABLE = (
    DType("bfloat16", 2, "BF16", "BFloat16Storage"),
    DType("float16", 2, "F16", "HalfStorage"),
    DType("float32", 4, "F32", "FloatStorage"),
    DType("float64", 8, "F64", "DoubleStorage"),
    DType("uint8", 1, "U8", "ByteStorage"),
    DType("int8", 1, "I8", "CharStorage"),
    DType("int16", 2, "I16", "ShortStorage"),
    DType("int32", 4, "I32", "IntStorage"),
    DType("int64", 8, "I64", "LongStorage"),
    DType("bool", 1, "BOOL", "BoolStorage"),
    DType("float8_e4m3fn", 1, "F8_E4M3", "UntypedStorage"),
    DType("float8_e5m2", 1, "F8_E5M2", "UntypedStorage"),
)
DTYPES: Mapping[str, DType] = {dtype.name: dtype for dtype in _TABLE}
BY_SAFETENSORS: Mapping[str, DType] = {dtype.safetensors: dtype for dtype in _TABLE}
BY_STORAGE: Mapping[str, DType] = {dtype.storage: dtype for dtype in _TABLE if dtype.storage != "UntypedStorage"}


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a tensor whose payload lies row-major and contiguous at `offset` (bytes) of `file`."""

    box: Box
    file: str
    offset: int
    nbytes: int
    crc: int | None = None  # CRC-32 of the payload where the format records one


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A stored tensor: global shape in elements and the chunks that tile it."""

    name: str
    dtype: DType
    shape: tuple[int, ...]
    chunks: tuple[Chunk, ...]

    @property
    def nbytes(self) -> int:
        """Payload bytes of the whole tensor."""
        return prod(self.shape) * self.dtype.size

    def known_as(self, name: str, dtype: DType, shape: tuple[int, ...]) -> TensorSpec:
        """What the same chunks hold, seen otherwise."""
        return TensorSpec(name, dtype, shape, self.chunks)


class Whole(TensorSpec):
    """A tensor in one chunk, which is made when it is asked for: a model has a hundred thousand of these."""

    __slots__ = ("file", "offset", "stored")
    file: str
    offset: int
    stored: int  # bytes

    def __init__(self, name: str, dtype: DType, shape: tuple[int, ...], file: str, offset: int, stored: int) -> None:
        put = object.__setattr__
        put(self, "name", name), put(self, "dtype", dtype), put(self, "shape", shape)
        put(self, "file", file), put(self, "offset", offset), put(self, "stored", stored)

    @property
    def chunks(self) -> tuple[Chunk, ...]:
        """Its one chunk."""
        return (Chunk(whole_box(self.shape), self.file, self.offset, self.stored),)

    def known_as(self, name: str, dtype: DType, shape: tuple[int, ...]) -> TensorSpec:
        """What the same chunk holds, seen otherwise."""
        return Whole(name, dtype, shape, self.file, self.offset, self.stored)


Catalog = Mapping[str, TensorSpec]  # everything a checkpoint contains, by name


@lru_cache(maxsize=4096)
def whole_box(shape: tuple[int, ...]) -> Box:
    """The box of all elements.

    >>> whole_box((3, 4))
    ((0, 3), (0, 4))
    """
    return tuple((0, extent) for extent in shape)


def box_shape(box: Box) -> tuple[int, ...]:
    """Extent of a box per dimension.

    >>> box_shape(((2, 5), (0, 4)))
    (3, 4)
    """
    return tuple([stop - start for start, stop in box])  # a list is faster here, and this runs for every chunk
