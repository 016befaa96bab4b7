"""Fingerprints of tensors: statistics in float64, and a sketch that makes two of them comparable without the tensors.

A sketch holds sums of all elements under random signs that depend on an element's token and feature alone. It is
linear, so that the sketches of shards add up to that of the whole, and the mean square of the difference of two
sketches estimates the squared length of the difference of the tensors (Alon, Matias, Szegedy 1996).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

WIDTH = 32  # sums of a sketch
_MIX = (np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB))  # SplitMix64
_STEP = np.uint64(0x9E3779B97F4A7C15)
TOKENS, FEATURES = np.uint64(1), np.uint64(2)


def _signs(index: NDArray[np.int64], salt: np.uint64) -> Any:
    """Signs [WIDTH, n] of the elements with these numbers."""
    with np.errstate(over="ignore"):
        mixed = (index.astype(np.uint64) * np.uint64(4) + salt) * _STEP
        for shift, factor in zip((30, 27), _MIX, strict=True):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * factor
    bits = (mixed >> np.arange(16, 16 + WIDTH, dtype=np.uint64)[:, None]) & np.uint64(1)
    return torch.from_numpy(bits.astype(np.float64) * 2 - 1)


@lru_cache(maxsize=64)
def _all_signs(count: int, salt: np.uint64) -> Any:
    return _signs(np.arange(count, dtype=np.int64), salt)


def sketch(rows: Any, features: Any = None, *, tokens_alike: bool = False) -> list[float]:
    """Sums under signs of a tensor [tokens, features].

    features: their numbers in the whole tensor, when they are not all. tokens_alike: the order of the tokens is
    nobody's business, and a token that occurs several times counts as their sum.
    """
    wide = rows.detach().double().cpu()
    columns = _all_signs(wide.shape[1], FEATURES) if features is None else _signs(features.numpy(), FEATURES)
    if tokens_alike:
        return [float(value) for value in columns @ wide.sum(0)]
    return [float(value) for value in ((_all_signs(wide.shape[0], TOKENS) @ wide) * columns).sum(1)]


def statistics(tensor: Any) -> dict[str, Any]:
    """Shape, dtype, device, min, max, mean and sum of absolute values; the latter four in float64."""
    found = {
        "shape": list(tensor.shape),
        "dtype": str(tensor.dtype).removeprefix("torch."),
        "device": tensor.device.type,
    }
    if tensor.numel() and not tensor.is_complex():
        wide = tensor.detach().double()
        numbers = {"min": wide.min(), "max": wide.max(), "mean": wide.mean(), "abs_sum": wide.abs().sum()}
        found |= {name: plain(float(value)) for name, value in numbers.items()}
    return found


def plain(number: float) -> float | str:
    """A number as JSON has it; what JSON has no number for as text.

    >>> plain(1.5), plain(float("nan"))
    (1.5, 'nan')
    """
    return number if math.isfinite(number) else str(number)


def distance(one: Sequence[float], other: Sequence[float], length: float) -> float:
    """The estimated length of the difference, relative to `length`; not a number where a sketch has none.

    >>> distance([3.0, 4.0], [3.0, 4.0], 5.0)
    0.0
    """
    square = sum((float(a) - float(b)) ** 2 for a, b in zip(one, other, strict=True)) / len(one)
    if square == 0.0:
        return 0.0
    return math.sqrt(square) / length if length else math.inf
