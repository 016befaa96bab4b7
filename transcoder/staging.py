"""Memory in which bytes are collected before they are written."""

from __future__ import annotations

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

PAGE = 4096  # bytes
STAGE = 1 << 20  # bytes collected before they are written, where their order changes
LARGEST = 4 << 20  # bytes that a thread keeps for each use
_kept = threading.local()


def aligned(size: int, offset: int) -> NDArray[Any]:
    """New memory of `size` bytes, as far from the start of a page as `offset` is.

    malloc puts large blocks at page + 16; some processors copy from there to the start of a page four times slower.
    """
    return _placed(np.empty(size + PAGE, np.uint8), size, offset)


def staging(size: int, offset: int, use: str) -> NDArray[Any]:
    """Memory like `aligned`, until the thread asks again for the same use: pages that the kernel has yet to clear
    cost as much again.
    """
    if size > LARGEST:
        return aligned(size, offset)
    blocks = _kept.__dict__
    if use not in blocks or len(blocks[use]) < size + PAGE:
        blocks[use] = np.empty(size + PAGE, np.uint8)
    return _placed(blocks[use], size, offset)


def _placed(block: NDArray[Any], size: int, offset: int) -> NDArray[Any]:
    skip = (offset - block.__array_interface__["data"][0]) % PAGE
    return block[skip : skip + size]
