"""The index of a zarr version 3 shard: offset and length of every inner chunk, then the CRC-32C of all that.

As in the specification of the codec `sharding_indexed`: 64-bit little-endian, all bits set for a chunk that is absent.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

ABSENT = (1 << 64) - 1
ENTRY = 16  # bytes
CHECKSUM = 4  # bytes


def emit(count: int, size: int) -> bytes:
    """The index behind `count` chunks of `size` bytes, one behind the other."""
    entries = b"".join(struct.pack("<QQ", number * size, size) for number in range(count))
    return entries + struct.pack("<I", crc32c(entries))


def parse(data: bytes) -> Sequence[tuple[int, int]] | None:
    """Offset and length of every chunk; None when the checksum is not that of the entries."""
    entries, (checksum,) = data[:-CHECKSUM], struct.unpack("<I", data[-CHECKSUM:])
    return list(struct.iter_unpack("<QQ", entries)) if crc32c(entries) == checksum else None


def crc32c(data: bytes) -> int:
    """The Castagnoli checksum.

    >>> hex(crc32c(b"123456789"))
    '0xe3069283'
    """
    table, crc = _table(), 0xFFFFFFFF
    for byte in data:
        crc = table[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    return crc ^ 0xFFFFFFFF


@lru_cache(maxsize=1)
def _table() -> tuple[int, ...]:
    found = []
    for value in range(256):
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
        found.append(value)
    return tuple(found)
