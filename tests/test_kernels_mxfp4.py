"""MXFP4 arithmetic agrees with transformers bit for bit, and what came from MXFP4 returns exactly."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from transcoder.kernels import casts, mxfp4

pytestmark = pytest.mark.usefixtures("loops")
Array = np.ndarray[Any, Any]
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TARGETS = pytest.mark.parametrize("target", TORCH)
GRID = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def by_transformers(blocks: Array, scales: Array, target: str) -> Array:
    """Blocks [..., rows, G, 16] decoded by transformers, which also transposes the last two dimensions."""
    flat, rows = blocks.reshape(-1, *blocks.shape[-3:]), scales.reshape(-1, *scales.shape[-2:])
    out = convert_moe_packed_tensors(torch.from_numpy(flat), torch.from_numpy(rows), dtype=TORCH[target])
    bits = out.transpose(1, 2).contiguous().view(torch.int32 if target == "float32" else torch.int16).numpy()
    return bits.view(np.uint32 if target == "float32" else np.uint16).reshape(*blocks.shape[:-2], -1)


def parts_of(rng: np.random.Generator, *shape: int) -> tuple[Array, Array]:
    """Random blocks and scales of the size that weights have."""
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(110, 130, shape, np.uint8)


def bits_of(values: Any, target: str = "bfloat16") -> Array:
    """One group that starts with these values, the rest zero."""
    group = np.zeros((1, 32), np.float32)
    group[0, : len(values)] = values
    return casts.from_float32(group, target)


def values_of(bits: Array, target: str = "bfloat16") -> Array:
    """Raw bits as float32."""
    return casts.to_float32(bits, target)


@TARGETS
def test_every_byte_under_every_scale_agrees_with_transformers(target: str) -> None:
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 16), (255, 16, 16)).copy()[None]
    scales = np.broadcast_to(np.arange(255, dtype=np.uint8)[:, None], (255, 16)).copy()[None]
    assert np.array_equal(mxfp4.decode(blocks, scales, target), by_transformers(blocks, scales, target))


@TARGETS
@pytest.mark.parametrize("shape", [(1, 3, 2), (4, 64, 90), (2, 3, 5, 7)])
def test_decoding_agrees_with_transformers(shape: tuple[int, ...], target: str) -> None:
    blocks, scales = parts_of(np.random.default_rng(1), *shape)
    assert np.array_equal(mxfp4.decode(blocks, scales, target), by_transformers(blocks, scales, target))


def test_the_low_nibble_comes_first() -> None:
    block = np.zeros((1, 16), np.uint8)
    block[0, 0] = 0xF2
    found = values_of(mxfp4.decode(block, np.array([128], np.uint8), "float32"), "float32")
    assert found[:3].tolist() == [2.0, -12.0, 0.0]


@TARGETS
def test_scale_255_makes_its_group_nan(target: str) -> None:
    blocks, scales = parts_of(np.random.default_rng(2), 1, 2)
    scales[0, 1] = 255
    found = values_of(mxfp4.decode(blocks, scales, target), target)[0]
    assert np.isnan(found).tolist() == [False] * 32 + [True] * 32
    assert np.array_equal(np.signbit(found[32::2]), blocks[0, 1] & 8 != 0)


def test_a_view_with_strides_decodes_like_its_copy() -> None:
    blocks, scales = parts_of(np.random.default_rng(3), 9, 12)
    found = mxfp4.decode(blocks[::2, 1:9:3], scales[::2, 1:9:3], "bfloat16")
    assert np.array_equal(found, mxfp4.decode(blocks[::2, 1:9:3].copy(), scales[::2, 1:9:3].copy(), "bfloat16"))


@PROPERTY
@given(st.lists(st.integers(0, 5), min_size=1, max_size=4), st.integers(0, 99), st.sampled_from(list(TORCH)))
def test_decoded_values_encode_to_the_same_file(shape: list[int], seed: int, target: str) -> None:
    blocks, scales = parts_of(np.random.default_rng(seed), *shape)
    again, kept = mxfp4.encode(mxfp4.decode(blocks, scales, target), target, scales)
    assert np.array_equal(again, blocks)
    assert np.array_equal(kept, scales)


def test_every_scale_that_bfloat16_can_hold_returns_exactly() -> None:
    blocks = np.broadcast_to(np.arange(256, dtype=np.uint8).reshape(16, 1, 16), (16, 252, 16)).copy()
    scales = np.broadcast_to(np.arange(252, dtype=np.uint8), (16, 252)).copy()
    again, kept = mxfp4.encode(mxfp4.decode(blocks, scales, "bfloat16"), "bfloat16", scales)
    assert np.array_equal(again, blocks)
    assert np.array_equal(kept, scales)


@TARGETS
@pytest.mark.parametrize("scale", [0, 1, 100, 140, 252, 253, 254, 255])
def test_extreme_kept_scales_give_back_the_same_bits(scale: int, target: str) -> None:
    blocks, scales = np.arange(240, 256, dtype=np.uint8)[None], np.array([scale], np.uint8)
    bits = mxfp4.decode(blocks, scales, target)
    again, kept = mxfp4.encode(bits, target, scales)
    assert kept.tolist() == [scale]
    assert np.array_equal(mxfp4.decode(again, kept, target), bits)


def test_one_changed_element_changes_the_scale_of_its_group_only() -> None:
    blocks, scales = parts_of(np.random.default_rng(4), 300, 30)
    blocks[::2] &= 0x99  # no magnitude above 0.5: a fresh scale would differ
    bits = mxfp4.decode(blocks, scales, "bfloat16")
    bits[200, 17 * 32 + 5] = casts.from_float32(np.array([1000.0], np.float32), "bfloat16")[0]
    again, kept = mxfp4.encode(bits, "bfloat16", scales)
    assert np.argwhere(kept != scales).tolist() == [[200, 17]]
    assert kept[200, 17] == 127 + 9 - 2
    same = np.ones((300, 30), bool)
    same[200, 17] = False
    assert np.array_equal(again[same], blocks[same])


def test_fresh_groups_hold_the_nearest_value_of_the_grid() -> None:
    rng = np.random.default_rng(5)
    bits = casts.from_float32((rng.normal(0, 1, (64, 320)) * 0.02).astype(np.float32), "bfloat16")
    blocks, scales = mxfp4.encode(bits, "bfloat16", None)
    values = values_of(bits).reshape(64, 10, 32)
    largest = np.abs(values).max(axis=-1)
    assert np.array_equal(scales, np.floor(np.log2(largest.astype(np.float64))).astype(int) - 2 + 127)
    unit = np.exp2(scales.astype(np.float64) - 127)[..., None]
    found = values_of(mxfp4.decode(blocks, scales, "bfloat16")).reshape(values.shape) / unit
    nearest = np.abs(np.abs(values / unit)[..., None] - GRID).min(axis=-1)
    assert np.array_equal(np.abs(found - values / unit), nearest)
    assert np.array_equal(np.signbit(found), np.signbit(values))


def test_ties_go_to_the_even_code_and_magnitudes_beyond_six_become_six() -> None:
    middles = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.0, -0.25, -0.75, -5.0, -7.75]
    blocks, scales = mxfp4.encode(bits_of(middles), "bfloat16", None)
    assert scales.tolist() == [[127]]
    found = values_of(mxfp4.decode(blocks, scales, "bfloat16"))[0, :12]
    assert found.tolist() == [0, 1, 1, 2, 2, 4, 4, 6, 0, -1, -4, -6]


def test_negative_zero_keeps_its_nibble() -> None:
    blocks, scales = mxfp4.encode(bits_of([-0.0, 0.0, 4.0, -0.0]), "bfloat16", None)
    assert blocks[0, 0, :2].tolist() == [0x08, 0x86]
    assert scales.tolist() == [[127]]


def test_an_all_zero_group_takes_scale_127_or_the_kept_one() -> None:
    zeros = bits_of([0.0, -0.0])
    assert mxfp4.encode(zeros, "bfloat16", None)[1].tolist() == [[127]]
    assert mxfp4.encode(zeros, "bfloat16", np.array([[3]], np.uint8))[1].tolist() == [[3]]


@pytest.mark.parametrize(("value", "scale"), [(1e-45, 0), (1e-38, 0), (2.0**-125, 0), (2.0**-124, 1), (3.4e38, 252)])
def test_fresh_scales_stay_in_range(value: float, scale: int) -> None:
    assert mxfp4.encode(bits_of([value], "float32"), "float32", None)[1].tolist() == [[scale]]


def test_infinity_saturates_and_a_nan_takes_its_group_without_a_warning() -> None:
    bits = np.concatenate([bits_of([np.inf, -np.inf, 1.0]), bits_of([1.0, np.nan]), bits_of([1.0])])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blocks, scales = mxfp4.encode(bits, "bfloat16", np.full((3, 1), 120, np.uint8))
    found = values_of(mxfp4.decode(blocks, scales, "bfloat16"))
    assert scales[:, 0].tolist() == [125, 255, 125]
    assert found[0, :3].tolist() == [1.5, -1.5, 1.0]
    assert np.isnan(found[1]).all()
    assert found[2, 0] == 1.0


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_temporary_memory_stays_small(work: str) -> None:
    blocks, scales = parts_of(np.random.default_rng(6), 512, 128)
    bits = mxfp4.decode(blocks, scales, "bfloat16")
    tracemalloc.start()
    if work == "decode":
        results: tuple[Array, ...] = (mxfp4.decode(blocks, scales, "bfloat16"),)
    else:
        results = mxfp4.encode(bits, "bfloat16", scales + np.uint8(60))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - sum(result.nbytes for result in results) < 2 << 20
