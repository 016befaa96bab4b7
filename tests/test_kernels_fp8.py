"""FP8 arithmetic agrees with torch and transformers bit for bit, and what came from FP8 returns exactly."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

from transcoder.kernels import casts, fp8

pytestmark = pytest.mark.usefixtures("loops")
Array = np.ndarray[Any, Any]
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
TARGETS = pytest.mark.parametrize("target", TORCH)
ALL = np.arange(256, dtype=np.uint8)
NUMBERS = ALL[(ALL & 0x7F) != 0x7F]
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def codes_of(rng: np.random.Generator, *shape: int) -> Array:
    """Random codes without NaN; -0 is among them."""
    return rng.choice(NUMBERS, shape)


def scales_of(rng: np.random.Generator, codes: Array, block: tuple[int, int]) -> Array:
    """Random scales, one for each block, of the size that weights have."""
    shape = [-(-size // extent) for size, extent in zip(codes.shape, block, strict=True)]
    return rng.uniform(1e-4, 3e-3, shape).astype(np.float32)


def by_torch(codes: Array, scales: Array, block: tuple[int, int], target: str) -> Array:
    """Decoded by torch, every scale repeated over its block."""
    rows, columns = (
        torch.from_numpy(np.arange(size) // extent) for size, extent in zip(codes.shape, block, strict=True)
    )
    factors = torch.from_numpy(scales)[rows][:, columns]
    values = torch.from_numpy(codes).view(torch.float8_e4m3fn).to(torch.float32) * factors
    return bits_of(values.to(TORCH[target]))


def bits_of(tensor: torch.Tensor) -> Array:
    """A torch tensor's raw bits."""
    return (
        tensor.contiguous()
        .view(torch.int16 if tensor.element_size() == 2 else torch.int32)
        .numpy()
        .view(np.uint16 if tensor.element_size() == 2 else np.uint32)
    )


def test_every_code_has_torchs_value_and_sign() -> None:
    expected = torch.from_numpy(ALL).view(torch.float8_e4m3fn).to(torch.float32).numpy()
    found = fp8.to_float32(ALL)
    assert np.array_equal(found, expected, equal_nan=True)
    assert np.array_equal(np.signbit(found), ALL >= 128)


@pytest.mark.parametrize("shape", [(), (0,), (1,), (3, 5), (2, 0, 3)])
def test_any_shape_keeps_its_shape(shape: tuple[int, ...]) -> None:
    codes = codes_of(np.random.default_rng(1), *shape).astype(np.uint8)
    values = fp8.to_float32(np.asarray(codes))
    assert values.shape == shape
    assert np.array_equal(fp8.from_float32(values), codes)


def test_rounding_agrees_with_torch_on_midpoints_and_their_neighbours() -> None:
    positive = fp8.to_float32(np.arange(0x7F, dtype=np.uint8))
    middles = (positive[1:] + positive[:-1]) / 2
    points = np.concatenate([middles, np.nextafter(middles, np.float32(0)), np.nextafter(middles, np.float32(999))])
    values = np.concatenate([points, -points]).astype(np.float32)
    assert np.array_equal(fp8.from_float32(values), torch_codes(values))


def test_rounding_agrees_with_torch_on_random_values() -> None:
    rng = np.random.default_rng(2)
    values = np.ldexp(rng.uniform(-1, 1, 200_000), rng.integers(-40, 9, 200_000)).astype(np.float32).clip(-448, 448)
    assert np.array_equal(fp8.from_float32(values), torch_codes(values))


def test_rounding_agrees_with_torch_on_every_bfloat16_in_range() -> None:
    values = casts.to_float32(np.arange(65536, dtype=np.uint16), "bfloat16")
    values = values[np.abs(values) <= 448]
    assert np.array_equal(fp8.from_float32(values), torch_codes(values))


def torch_codes(values: Array) -> Array:
    """torch's conversion to e4m3fn."""
    return torch.from_numpy(values).to(torch.float8_e4m3fn).view(torch.uint8).numpy()


def test_beyond_the_range_saturates_and_nan_keeps_its_sign() -> None:
    nan = np.array([0x7F800001, 0xFFFFFFFF], np.uint32).view(np.float32)
    values = np.array([449, 1e30, np.inf, -464.1, -np.inf, *nan, -0.0, 1e-45], np.float32)
    assert fp8.from_float32(values).tolist() == [0x7E, 0x7E, 0x7E, 0xFE, 0xFE, 0x7F, 0xFF, 0x80, 0]


SHAPES = [((256, 256), (128, 128)), ((200, 300), (128, 128)), ((5, 7), (128, 128)), ((600, 130), (128, 64))]


@TARGETS
@pytest.mark.parametrize(("shape", "block"), [*SHAPES, ((37, 96), (1, 32)), ((9, 33), (2, 5)), ((40, 21), (40, 21))])
def test_decoding_agrees_with_torch(shape: tuple[int, int], block: tuple[int, int], target: str) -> None:
    rng = np.random.default_rng(3)
    codes = codes_of(rng, *shape)
    scales = scales_of(rng, codes, block)
    assert np.array_equal(fp8.decode(codes, scales, block, target), by_torch(codes, scales, block, target))


@TARGETS
@pytest.mark.parametrize("block", [(128, 128), (64, 32), (256, 384)])
def test_decoding_agrees_with_transformers(block: tuple[int, int], target: str) -> None:
    rng = np.random.default_rng(4)
    codes = codes_of(rng, 256, 384)
    scales = scales_of(rng, codes, block)
    weight = torch.from_numpy(codes).view(torch.float8_e4m3fn)
    expected = Fp8Dequantize(None)._dequantize_one(weight, torch.from_numpy(scales), TORCH[target])
    assert np.array_equal(fp8.decode(codes, scales, block, target), bits_of(expected))


@TARGETS
@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, 1e-40, 3e-39, 2.0**-120, 1.0, -0.37, 2.0**9, 1e30, 3.4e38])
def test_zero_subnormal_and_huge_scales_agree_with_torch(scale: float, target: str) -> None:
    codes, scales = NUMBERS.reshape(1, -1), np.full((1, 1), scale, np.float32)
    found = fp8.decode(codes, scales, codes.shape, target)
    assert np.array_equal(found, by_torch(codes, scales, codes.shape, target))


@TARGETS
def test_products_halfway_between_two_numbers_round_to_even_as_torch_does(target: str) -> None:
    scales = (np.arange(0x3F80, 0x4000, dtype=np.uint32) << 16).view(np.float32)[:, None]
    codes = np.tile(NUMBERS, (len(scales), 1))
    block = (1, codes.shape[1])
    halves = by_torch(codes, scales, block, "float32") & 0xFFFF == 0x8000
    assert halves.sum() > 1000
    assert np.array_equal(fp8.decode(codes, scales, block, target), by_torch(codes, scales, block, target))


@TARGETS
@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000])
def test_scales_that_are_no_numbers_decode_to_nan_where_torch_does(pattern: int, target: str) -> None:
    codes, scales = ALL.reshape(1, -1), np.full((1, 1), pattern, np.uint32).view(np.float32)
    found = casts.to_float32(fp8.decode(codes, scales, codes.shape, target), target)
    expected = casts.to_float32(by_torch(codes, scales, codes.shape, target), target)
    assert np.array_equal(found, expected, equal_nan=True)


@TARGETS
def test_nan_codes_keep_their_sign(target: str) -> None:
    codes = np.array([[0x7F, 0xFF, 0x38, 0xFF, 0x7F]], np.uint8)
    values = casts.to_float32(fp8.decode(codes, np.full((1, 1), 0.3, np.float32), (1, 5), target), target)
    assert np.isnan(values).tolist() == [[True, True, False, True, True]]
    assert np.signbit(values).tolist() == [[False, True, False, True, False]]


def test_a_view_with_strides_decodes_like_its_copy() -> None:
    rng = np.random.default_rng(5)
    codes = codes_of(rng, 70, 300)[:, 3:294:2]
    scales = scales_of(rng, codes, (32, 32))
    assert np.array_equal(
        fp8.decode(codes, scales, (32, 32), "bfloat16"), fp8.decode(codes.copy(), scales, (32, 32), "bfloat16")
    )


@PROPERTY
@given(st.integers(0, 70), st.integers(0, 70), st.integers(1, 40), st.integers(1, 40), st.sampled_from(list(TORCH)))
def test_decoded_values_encode_to_the_same_file(n: int, k: int, rows: int, columns: int, target: str) -> None:
    rng = np.random.default_rng([n, k, rows, columns])
    codes = rng.choice(ALL, (n, k))
    scales = scales_of(rng, codes, (rows, columns))
    bits = fp8.decode(codes, scales, (rows, columns), target)
    again, kept = fp8.encode(bits, target, (rows, columns), scales)
    assert np.array_equal(again, codes)
    assert np.array_equal(kept, scales)


@pytest.mark.parametrize(
    ("shape", "block"), [((300, 1000), (128, 128)), ((3, 70_000), (2, 128)), ((700, 400), (700, 400))]
)
def test_tensors_of_several_strips_return_exactly(shape: tuple[int, int], block: tuple[int, int]) -> None:
    rng = np.random.default_rng(6)
    codes = codes_of(rng, *shape)
    scales = scales_of(rng, codes, block)
    bits = fp8.decode(codes, scales, block, "bfloat16")
    assert np.array_equal(bits, by_torch(codes, scales, block, "bfloat16"))
    again, kept = fp8.encode(bits, "bfloat16", block, scales)
    assert np.array_equal(again, codes)
    assert np.array_equal(kept, scales)


@pytest.mark.parametrize("scale", [0.0, -0.0, 1e-45, 2.0**9, -0.01])
def test_odd_kept_scales_give_back_the_same_bits(scale: float) -> None:
    scales = np.full((1, 1), scale, np.float32)
    bits = fp8.decode(np.array([[0, 1, 0x38, 0x70]], np.uint8), scales, (1, 4), "bfloat16")
    codes, kept = fp8.encode(bits, "bfloat16", (1, 4), scales)
    assert np.array_equal(kept.view(np.uint32), scales.view(np.uint32))
    assert np.array_equal(fp8.decode(codes, kept, (1, 4), "bfloat16"), bits)


def test_one_changed_element_changes_the_scale_of_its_block_only() -> None:
    rng = np.random.default_rng(7)
    codes = codes_of(rng, 300, 290)
    scales = scales_of(rng, codes, (128, 128))
    bits = fp8.decode(codes, scales, (128, 128), "bfloat16")
    bits[130, 260] = casts.from_float32(np.array([5.0], np.float32), "bfloat16")[0]
    again, kept = fp8.encode(bits, "bfloat16", (128, 128), scales)
    changed = kept != scales
    assert np.argwhere(changed).tolist() == [[1, 2]]
    assert kept[1, 2] == np.float32(5) / np.float32(448)
    outside = np.ones(codes.shape, bool)
    outside[128:256, 256:] = False
    assert np.array_equal(again[outside], codes[outside])
    assert fp8.to_float32(again)[130, 260] == 448


def test_fresh_scales_and_codes_are_the_ones_torch_computes() -> None:
    rng = np.random.default_rng(8)
    values = torch.from_numpy(rng.normal(0, 0.02, (256, 384)).astype(np.float32)).to(torch.bfloat16)
    codes, scales = fp8.encode(bits_of(values), "bfloat16", (128, 128), None)
    blocks = values.float().reshape(2, 128, 3, 128)
    expected = blocks.abs().amax(dim=(1, 3)) / 448
    quotients = (blocks / expected[:, None, :, None]).clamp(-448, 448).reshape(256, 384).numpy()
    assert np.array_equal(scales, expected.numpy())
    assert np.array_equal(codes, torch_codes(quotients))


def test_an_all_zero_block_takes_scale_one_and_keeps_signs() -> None:
    codes, scales = fp8.encode(np.array([[0, 0x8000]], np.uint16), "bfloat16", (1, 2), None)
    assert scales.tolist() == [[1.0]]
    assert codes.tolist() == [[0, 0x80]]


def test_the_smallest_values_get_a_scale_above_zero() -> None:
    codes, scales = fp8.encode(np.array([[1, 0]], np.uint32), "float32", (1, 2), None)
    assert scales[0, 0] > 0
    assert fp8.decode(codes, scales, (1, 2), "float32").tolist() == [[1, 0]]


def test_infinity_saturates_and_nan_stays_nan_without_a_warning() -> None:
    values = np.array([[1.0, np.inf, -np.inf, np.nan, -2.0], [np.inf, np.nan, 0, 0, 0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        codes, scales = fp8.encode(values.view(np.uint32), "float32", (1, 5), np.full((2, 1), np.nan, np.float32))
    found = fp8.decode(codes, scales, (1, 5), "float32").view(np.float32)
    assert scales.tolist() == [[np.float32(2) / np.float32(448)], [1.0]]
    assert np.isnan(found).tolist() == np.isnan(values).tolist()
    assert np.allclose(found[0, [0, 1, 2, 4]], [1, 2, -2, -2], rtol=0.07)
    assert found[1, 0] == 448


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_temporary_memory_stays_small(work: str) -> None:
    codes = codes_of(np.random.default_rng(9), 512, 4096)
    scales = scales_of(np.random.default_rng(9), codes, (128, 128))
    bits = fp8.decode(codes, scales, (128, 128), "bfloat16")
    tracemalloc.start()
    if work == "decode":
        results: tuple[Array, ...] = (fp8.decode(codes, scales, (128, 128), "bfloat16"),)
    else:
        results = fp8.encode(bits, "bfloat16", (128, 128), scales * np.float32(1.5))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - sum(result.nbytes for result in results) < 2 << 20
