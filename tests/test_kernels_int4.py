"""INT4 arithmetic agrees with compressed-tensors' rules written in torch, and what came from INT4 returns exactly."""

from __future__ import annotations

import tracemalloc
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.kernels import casts, int4

pytestmark = pytest.mark.usefixtures("loops")
Array = np.ndarray[Any, Any]
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
SIGNED = {"bfloat16": torch.int16, "float16": torch.int16, "float32": torch.int32}
CELLS = {"bfloat16": np.uint16, "float16": np.uint16, "float32": np.uint32}
TARGETS = pytest.mark.parametrize("target", TORCH)
PROPERTY = settings(deadline=None, max_examples=60, derandomize=True)


def pack(integers: Array) -> Array:
    """pack_to_int32 of compressed-tensors for four bits: + 8, padded with zero bits, lowest bits first."""
    n, k = integers.shape
    padded = torch.nn.functional.pad(torch.from_numpy(integers).to(torch.int64) + 8, (0, -k % 8))
    words = (padded.reshape(n, -(-k // 8), 8) << (torch.arange(8) * 4)).sum(dim=-1)
    return words.numpy().astype(np.uint32)


def by_torch(integers: Array, scales: Array, dtype: str, group: int, target: str) -> Array:
    """Integers times the scales of their groups, rounded once by torch."""
    factors = tensor_of(scales, dtype).float()[:, torch.from_numpy(np.arange(integers.shape[1]) // group)]
    return bits_of((torch.from_numpy(integers).float() * factors).to(TORCH[target]))


def tensor_of(bits: Array, dtype: str) -> torch.Tensor:
    """Raw bits as a torch tensor."""
    return torch.from_numpy(bits.view(np.int32 if dtype == "float32" else np.int16)).view(TORCH[dtype])


def bits_of(tensor: torch.Tensor) -> Array:
    """A torch tensor's raw bits."""
    name = str(tensor.dtype).removeprefix("torch.")
    return tensor.contiguous().view(SIGNED[name]).numpy().view(CELLS[name])


def parts_of(seed: Any, n: int, k: int, group: int, dtype: str = "bfloat16") -> tuple[Array, Array]:
    """Random integers and scales."""
    rng = np.random.default_rng(seed)
    scales = rng.uniform(1e-3, 1e-2, (n, -(-k // group))).astype(np.float32)
    return rng.integers(-8, 8, (n, k), np.int8), casts.from_float32(scales, dtype)


@TARGETS
@pytest.mark.parametrize("dtype", TORCH)
@pytest.mark.parametrize(("n", "k", "group"), [(4, 64, 32), (3, 50, 32), (5, 7, 3), (9, 128, 128), (2, 40, 64)])
def test_decoding_agrees_with_torch(n: int, k: int, group: int, dtype: str, target: str) -> None:
    integers, scales = parts_of([n, k], n, k, group, dtype)
    found = int4.decode(pack(integers), scales, dtype, k, group, target)
    assert np.array_equal(found, by_torch(integers, scales, dtype, group, target))


def test_the_lowest_bits_are_the_first_column() -> None:
    bits = int4.decode(
        np.array([[0xFEDC0008]], np.uint32), np.array([[0x3F80]], np.uint16), "bfloat16", 8, 32, "float32"
    )
    assert bits.view(np.float32).tolist() == [[0, -8, -8, -8, 4, 5, 6, 7]]


@TARGETS
@pytest.mark.parametrize("scale", [0.0, -0.5, 1e-45, 1e-39, 1e-6, 3e37, 3.4e38])
def test_zero_subnormal_and_huge_scales_agree_with_torch_and_return(scale: float, target: str) -> None:
    integers, scales = np.arange(-8, 8, dtype=np.int8)[None], np.full((1, 1), scale, np.float32).view(np.uint32)
    bits = int4.decode(pack(integers), scales, "float32", 16, 16, target)
    assert np.array_equal(bits, by_torch(integers, scales, "float32", 16, target))
    packed, kept = int4.encode(bits, target, 16, scales, "float32")
    assert np.array_equal(kept, scales)
    assert np.array_equal(int4.decode(packed, kept, "float32", 16, 16, target), bits)


@pytest.mark.parametrize("pattern", [0x7FC00000, 0xFFFFFFFF, 0x7FFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000])
def test_scales_that_are_no_numbers_decode_to_nan_where_torch_does(pattern: int) -> None:
    integers, scales = np.arange(-8, 8, dtype=np.int8)[None], np.full((1, 1), pattern, np.uint32)
    found = casts.to_float32(int4.decode(pack(integers), scales, "float32", 16, 16, "bfloat16"), "bfloat16")
    expected = casts.to_float32(by_torch(integers, scales, "float32", 16, "bfloat16"), "bfloat16")
    assert np.array_equal(found, expected, equal_nan=True)


@PROPERTY
@given(st.integers(0, 40), st.integers(0, 90), st.integers(1, 64), st.sampled_from(list(TORCH)))
def test_decoded_values_encode_to_the_same_file(n: int, k: int, group: int, dtype: str) -> None:
    integers, scales = parts_of([n, k, group], n, k, group, dtype)
    packed = pack(integers)
    again, kept = int4.encode(int4.decode(packed, scales, dtype, k, group, dtype), dtype, group, scales, dtype)
    assert np.array_equal(again, packed)
    assert np.array_equal(kept, scales)


@pytest.mark.parametrize(("n", "k"), [(300, 1000), (2, 70_000)])
def test_tensors_of_several_strips_return_exactly(n: int, k: int) -> None:
    integers, scales = parts_of(1, n, k, 32)
    bits = int4.decode(pack(integers), scales, "bfloat16", k, 32, "bfloat16")
    assert np.array_equal(bits, by_torch(integers, scales, "bfloat16", 32, "bfloat16"))
    again, kept = int4.encode(bits, "bfloat16", 32, scales, "bfloat16")
    assert np.array_equal(again, pack(integers))
    assert np.array_equal(kept, scales)


def test_one_changed_element_changes_the_scale_of_its_group_only() -> None:
    integers, scales = parts_of(2, 200, 640, 32)
    bits = int4.decode(pack(integers), scales, "bfloat16", 640, 32, "bfloat16")
    bits[150, 70] = 0x4000
    again, kept = int4.encode(bits, "bfloat16", 32, scales, "bfloat16")
    assert np.argwhere(kept != scales).tolist() == [[150, 2]]
    assert kept[150, 2] == casts.from_float32(np.array([2 / 7.5], np.float32), "bfloat16")[0]
    same = np.ones(again.shape, bool)
    same[150, 8:12] = False
    assert np.array_equal(again[same], pack(integers)[same])


@TARGETS
def test_fresh_scales_and_integers_are_compressed_tensors(target: str) -> None:
    rng = np.random.default_rng(3)
    values = torch.from_numpy(rng.normal(0, 0.02, (64, 320)).astype(np.float32)).to(TORCH[target])
    packed, scales = int4.encode(bits_of(values), target, 32, None, target)
    groups = values.reshape(64, 10, 32)
    expected = groups.abs().amax(dim=-1) / 7.5
    integers = (groups.float() / expected.float()[..., None]).clamp(-8, 7).round().reshape(64, 320)
    assert np.array_equal(scales, bits_of(expected))
    assert np.array_equal(packed, pack(integers.to(torch.int8).numpy()))


@TARGETS
def test_an_all_zero_group_takes_the_scale_types_epsilon(target: str) -> None:
    packed, scales = int4.encode(np.zeros((1, 8), CELLS[target]), target, 8, None, target)
    assert casts.to_float32(scales, target).tolist() == [[torch.finfo(TORCH[target]).eps]]
    assert packed.tolist() == [[0x88888888]]


def test_a_scale_beyond_float16_becomes_its_largest() -> None:
    _, scales = int4.encode(np.full((1, 8), 1e9, np.float32).view(np.uint32), "float32", 8, None, "float16")
    assert scales.view(np.float16).tolist() == [[65504.0]]


def test_negative_zero_loses_its_sign_under_a_fresh_scale() -> None:
    bits = np.array([[0x8000, 0x3F80]], np.uint16)
    packed, scales = int4.encode(bits, "bfloat16", 2, None, "bfloat16")
    found = int4.decode(packed, scales, "bfloat16", 2, 2, "bfloat16")
    assert found[0, 0] == 0


def test_infinity_saturates_and_a_nan_takes_its_group_without_a_warning() -> None:
    values = np.array([[np.inf, -np.inf, 7.5, 0.0], [1.0, np.nan, 0.0, 0.0], [7.5, 1.0, -7.5, -0.0]], np.float32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        packed, scales = int4.encode(
            values.view(np.uint32), "float32", 4, np.full((3, 1), 0x7FC0, np.uint16), "bfloat16"
        )
    found = int4.decode(packed, scales, "bfloat16", 4, 4, "float32").view(np.float32)
    assert found[0].tolist() == [7, -8, 7, 0]
    assert np.isnan(found[1]).all()
    assert found[2].tolist() == [7, 1, -8, 0]


@pytest.mark.parametrize("work", ["decode", "encode"])
def test_temporary_memory_stays_small(work: str) -> None:
    integers, scales = parts_of(4, 512, 4096, 32)
    packed = pack(integers)
    bits = int4.decode(packed, scales, "bfloat16", 4096, 32, "bfloat16")
    tracemalloc.start()
    if work == "decode":
        results: tuple[Array, ...] = (int4.decode(packed, scales, "bfloat16", 4096, 32, "bfloat16"),)
    else:
        results = int4.encode(bits, "bfloat16", 32, scales + np.uint16(64), "bfloat16")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak - sum(result.nbytes for result in results) < 2 << 20
