"""The compiled loops give the bits that NumPy gives, whatever codes, scales and shapes, and are used where meant."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.kernels import casts, fp8, int4, mxfp4, native, strided

Array = np.ndarray[Any, Any]
PROPERTY = settings(deadline=None, max_examples=150, derandomize=True)
TARGETS = st.sampled_from(["bfloat16", "float16", "float32"])
SPECIAL = [0x7FC00000, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000, 0, 0x80000000, 1, 0x80000001, 0x007FFFFF]
NUMBERS = [1e-45, 2.0**-101, 2.0**-100, 1e-20, 1.37e-4, 0.01, 1.0, 63.9, 64.0, 64.1, 127.9, 128.0, -0.3, -200.0, 3e38]
PATTERNS = [*SPECIAL, *np.array(NUMBERS, np.float32).view(np.uint32).tolist()]
SEEDS = st.integers(0, 2**32 - 1)
BUILT = native.LIBRARY is not None


def by_numpy(work: Callable[[], Any]) -> Any:
    """The same without the library."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "LIBRARY", None)
        return work()


def same(work: Callable[[], Any]) -> None:
    """Both ways give the same bits."""
    pairs = zip(_listed(work()), _listed(by_numpy(work)), strict=True)
    for found, expected in pairs:
        assert found.dtype.itemsize == expected.dtype.itemsize and found.shape == expected.shape
        assert found.tobytes() == expected.tobytes()


def _listed(result: Any) -> list[Array]:
    return list(result) if isinstance(result, tuple) else [result]


def floats(patterns: list[int]) -> Array:
    """float32 values by their bits."""
    return np.array(patterns, np.uint32).view(np.float32)


def test_the_library_is_there_wherever_a_compiler_is() -> None:
    assert BUILT or shutil.which("cc") is None


@pytest.mark.parametrize("content", [None, b"", b"\x7fELF and then nothing"])
def test_a_missing_or_broken_library_is_done_without(tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "_native.abi3.so").write_bytes(content)
    assert native.load(tmp_path) is None


def test_the_environment_can_leave_it_aside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRANSCODER_NATIVE", "0")
    assert native.load(Path(native.__file__).parent) is None


@PROPERTY
@given(st.integers(0, 70), st.integers(0, 200), st.integers(1, 130), st.integers(1, 130), TARGETS, SEEDS, st.data())
def test_fp8_decodes_alike(n: int, k: int, high: int, wide: int, target: str, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    codes, across = rng.integers(0, 256, (n, k), np.uint8), (-(-n // high), -(-k // wide))
    odd = data.draw(st.sampled_from([0, 0.1, 1]))
    scales = np.where(rng.random(across) < odd, rng.choice(floats(PATTERNS), across), rng.uniform(-0.1, 0.1, across))
    same(lambda: fp8.decode(codes, scales.astype(np.float32), (high, wide), target))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_fp8_code_decodes_alike_under_odd_scales(pattern: int) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(1, -1)
    same(lambda: fp8.decode(codes, floats([pattern]).reshape(1, 1), (1, 256), "bfloat16"))


@PROPERTY
@given(st.integers(0, 70), st.integers(0, 200), st.integers(1, 130), st.integers(1, 130), TARGETS, SEEDS)
def test_fp8_encodes_alike_what_came_from_fp8(n: int, k: int, high: int, wide: int, source: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    scales = rng.uniform(1e-4, 2, (-(-n // high), -(-k // wide))).astype(np.float32)
    bits = fp8.decode(rng.integers(0, 255, (n, k), np.uint8) & 0xFE, scales, (high, wide), source)
    same(lambda: fp8.encode(bits, source, (high, wide), scales))
    if bits.size:
        bits[-1, -1] ^= 1
        same(lambda: fp8.encode(bits, source, (high, wide), scales))


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rows", [65536, 1])
def test_every_bfloat16_encodes_to_fp8_alike(pattern: int, rows: int) -> None:
    bits = np.arange(65536, dtype=np.uint16).reshape(rows, -1)
    scales = np.full((rows, 1), floats([pattern])[0], np.float32)
    same(lambda: fp8.encode(bits, "bfloat16", (1, bits.shape[1]), scales))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_fp8_code_returns_alike_under_odd_scales(pattern: int) -> None:
    scales = floats([pattern]).reshape(1, 1)
    for code in range(256):
        bits = fp8.decode(np.array([[code]], np.uint8), scales, (1, 1), "bfloat16")
        same(lambda bits=bits: fp8.encode(bits, "bfloat16", (1, 1), scales))


@pytest.mark.parametrize("target", ["bfloat16", "float16", "float32"])
def test_every_mxfp4_byte_under_every_scale_goes_there_and_back_alike(target: str) -> None:
    blocks = np.tile(np.arange(256, dtype=np.uint8).reshape(-1, 16), (256, 1))
    scales = np.repeat(np.arange(256, dtype=np.uint8), 16)
    same(lambda: mxfp4.decode(blocks, scales, target))
    bits = mxfp4.decode(blocks, scales, target).reshape(-1, 32)
    for part, scale in zip(np.split(bits, 256), np.split(scales.reshape(-1, 1), 256), strict=True):
        same(lambda part=part, scale=scale: mxfp4.encode(part, target, scale))


@pytest.mark.parametrize("scale", [0, 1, 2, 3, 100, 127, 251, 252, 253, 254, 255])
def test_every_bfloat16_encodes_to_mxfp4_alike(scale: int) -> None:
    values = np.arange(65536, dtype=np.uint16)
    for bits in (values.reshape(-1, 32), np.repeat(values[::7], 32).reshape(-1, 32)):
        kept = np.full((len(bits), 1), scale, np.uint8)
        same(lambda bits=bits, kept=kept: mxfp4.encode(bits, "bfloat16", kept))


def test_each_bfloat16_is_found_by_the_compiled_loop_where_numpy_finds_it() -> None:
    scales = np.arange(2, 253, 10, dtype=np.uint8)
    for scale in scales:
        numbers = mxfp4.decode(np.arange(256, dtype=np.uint8).reshape(-1, 16), np.full(16, scale), "bfloat16")
        assert native.mxfp4_encode(numbers.reshape(-1, 32), np.full(16, scale), np.empty((16, 16), np.uint8)) is BUILT
        numbers[5] ^= 1
        assert not native.mxfp4_encode(numbers.reshape(-1, 32), np.full(16, scale), np.empty((16, 16), np.uint8))


@PROPERTY
@given(st.integers(0, 9), st.integers(0, 200), st.sampled_from([3, 8, 16, 32, 64, 96]), TARGETS, TARGETS, SEEDS)
def test_int4_decodes_alike(n: int, k: int, group: int, dtype: str, target: str, seed: int) -> None:
    rng = np.random.default_rng(seed)
    columns = k if seed % 3 else k // 32 * 32
    packed, across = rng.integers(0, 2**32, (n, -(-columns // 8)), np.uint32), (n, -(-columns // group))
    values = np.where(rng.random(across) < 0.05, rng.choice(floats(PATTERNS), across), rng.uniform(-1, 1, across))
    with np.errstate(all="ignore"):
        scales = casts.from_float32(values.astype(np.float32), dtype)
    same(lambda: int4.decode(packed, scales, dtype, columns, group, target))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_every_int4_byte_decodes_alike_under_odd_scales(pattern: int) -> None:
    packed, scales = np.arange(256, dtype=np.uint8).view(np.uint32).reshape(2, -1), np.full((2, 8), pattern, np.uint32)
    same(lambda: int4.decode(packed, scales, "float32", 256, 32, "bfloat16"))


@PROPERTY
@given(st.lists(st.integers(0, 70), min_size=1, max_size=3), st.sampled_from("BHIQ"), SEEDS, st.data())
def test_strided_copies_agree_with_assignment(shape: list[int], kind: str, seed: int, data: st.DataObject) -> None:
    rng = np.random.default_rng(seed)
    source, to = (_strided(rng, tuple(shape), kind, data) for _ in range(2))
    before = to.copy()
    strided.copy(to, source)
    assert np.array_equal(to, source)
    to[...] = before
    by_numpy(lambda: strided.copy(to, source))
    assert np.array_equal(to, source)


def _strided(rng: np.random.Generator, shape: tuple[int, ...], kind: str, data: st.DataObject) -> Array:
    """An array of this shape, its axes in some order with some gaps."""
    order = data.draw(st.permutations(range(len(shape))))
    gap = data.draw(st.integers(1, 3))
    memory = rng.integers(0, 256, (*(shape[axis] for axis in order), gap), dtype=np.uint8).astype(kind)
    return memory[..., 0].transpose(np.argsort(order))


@pytest.mark.parametrize("kind", "HI")
@pytest.mark.parametrize("shape", [(64, 64), (63, 65), (128, 200), (1, 5000), (5000, 1), (257, 130)])
@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (2, 1), (1, 2), (3, 3)])
def test_a_turned_matrix_leaves_its_neighbours_alone(
    kind: str, shape: tuple[int, int], rows: int, columns: int
) -> None:
    high, wide = shape
    source = np.arange(1, high * wide * rows + 1).astype(kind).reshape(wide, high * rows)[:, ::rows].T
    memory = np.zeros((high + 2, wide * columns + 2), kind)
    to = memory[1:-1, 1 : 1 + wide * columns : columns]
    assert native.turn(to, source) is BUILT
    to[...] = 0
    assert not memory.any()
    strided.copy(to, source)
    assert np.array_equal(to, source)


def test_views_cannot_leave_their_memory() -> None:
    flat = np.arange(12)
    assert strided.view(flat, 1, (2, 3), (6, 2)).tolist() == [[1, 3, 5], [7, 9, 11]]
    for first, shape, steps in [(2, (2, 3), (6, 2)), (-1, (2,), (1,)), (0, (2,), (-1,)), (0, (13,), (1,))]:
        with pytest.raises(ValueError, match="elements"):
            strided.view(flat, first, shape, steps)


def test_the_usual_cases_are_done_by_the_library() -> None:
    codes, scales = np.zeros((256, 256), np.uint8), np.full((2, 2), 0.01, np.float32)
    out = np.ones((256, 256), np.uint16)
    assert native.fp8_decode(codes, scales, (128, 128), out) is BUILT
    assert native.fp8_encode(np.zeros_like(out), scales, (128, 128), codes) is BUILT
    table = np.zeros(1 << 16, np.uint32)
    assert (
        native.mxfp4_decode(np.zeros((8, 16), np.uint8), np.zeros(8, np.uint8), table, out[:1].reshape(8, 32)) is BUILT
    )
    assert (
        native.int4_decode(np.zeros((2, 8), np.uint32), np.ones((2, 2), np.float32), 64, 32, out[:2, :64].copy())
        is BUILT
    )


def _refusals() -> list[Callable[[], bool]]:
    codes, scales, out = np.zeros((4, 8), np.uint8), np.ones((1, 1), np.float32), np.zeros((4, 8), np.uint16)
    fixed = out.copy()
    fixed.flags.writeable = False
    blocks, bytes_, table = np.zeros((2, 16), np.uint8), np.full(2, 100, np.uint8), np.zeros(1 << 16, np.uint32)
    pairs, words = np.zeros((2, 32), np.uint16), np.zeros((2, 4), np.uint32)
    return [
        lambda: native.fp8_decode(codes, scales, (4, 8), out[:, ::2]),
        lambda: native.fp8_decode(codes, scales, (4, 8), out[:3]),
        lambda: native.fp8_decode(codes, scales, (4, 8), fixed),
        lambda: native.fp8_decode(codes, scales, (4, 8), out.astype(np.uint32)),
        lambda: native.fp8_decode(codes, scales, (2, 8), out),
        lambda: native.fp8_decode(codes, scales.astype(np.float64), (4, 8), out),
        lambda: native.fp8_decode(codes[:0], scales[:0], (4, 8), out[:0]),
        lambda: native.fp8_decode(codes, scales, (0, 8), out),
        lambda: native.fp8_encode(out, scales, (4, 8), codes[:, ::2]),
        lambda: native.fp8_encode(out.astype(np.uint32), scales, (4, 8), codes),
        lambda: native.mxfp4_decode(blocks, bytes_[:1], table, pairs),
        lambda: native.mxfp4_decode(blocks, bytes_, table[:-1], pairs),
        lambda: native.mxfp4_decode(blocks, bytes_, table, pairs[:1]),
        lambda: native.mxfp4_encode(pairs, bytes_[:1], blocks),
        lambda: native.mxfp4_encode(pairs, bytes_ * 0, blocks),
        lambda: native.mxfp4_encode(pairs, bytes_, blocks[:, :8]),
        lambda: native.int4_decode(words, np.ones((2, 2), np.float32), 32, 32, pairs),
        lambda: native.int4_decode(words, np.ones((2, 1), np.float32), 32, 16, pairs),
        lambda: native.int4_decode(words[:1], np.ones((2, 1), np.float32), 32, 32, pairs),
        lambda: native.turn(out, codes),
        lambda: native.turn(fixed, out),
        lambda: native.turn(out, out[:3]),
        lambda: native.turn(out.reshape(-1), out.reshape(-1)),
        lambda: native.turn(codes, codes),
    ]


@pytest.mark.parametrize("number", range(len(_refusals())))
def test_what_the_library_cannot_do_is_left_to_numpy(number: int) -> None:
    assert _refusals()[number]() is False
