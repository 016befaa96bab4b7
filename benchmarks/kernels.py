"""Times the kernels on one core, compiled and in NumPy: GB/s of bfloat16 values, beside `memcpy` of the same bytes.

Rounds are interleaved (copy, first kernel, second kernel, …) so that a slow moment of the machine meets all alike; the
table shows the best round and the median. Times are those of the thread: others may use the machine, too. Every case
also checks that encoding returns the stored bytes.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py --rounds 7
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from transcoder.kernels import fp8, int4, mxfp4, native, strided

BLOCK = (128, 128)
GROUP = 32


@dataclass(frozen=True)
class Case:
    """One kernel with its arguments bound."""

    name: str
    work: Callable[[], Any]


def fp8_cases(rng: np.random.Generator, rows: int, columns: int) -> list[Case]:
    """Codes that normally distributed weights have, and a scale for each block."""
    codes = fp8.from_float32(rng.normal(0, 100, (rows, columns)).astype(np.float32))
    shape = [-(-size // extent) for size, extent in zip(codes.shape, BLOCK, strict=True)]
    scales = rng.uniform(1e-4, 2e-4, shape).astype(np.float32)
    values = fp8.decode(codes, scales, BLOCK, "bfloat16")
    returned(fp8.encode(values, "bfloat16", BLOCK, scales), (codes, scales))
    return [
        Case("FP8 decode, 128 x 128", lambda: fp8.decode(codes, scales, BLOCK, "bfloat16")),
        Case("FP8 decode, one scale", lambda: fp8.decode(codes, scales[:1, :1], codes.shape, "bfloat16")),
        Case("FP8 encode, kept scales", lambda: fp8.encode(values, "bfloat16", BLOCK, scales)),
        Case("FP8 encode, new scales", lambda: fp8.encode(values, "bfloat16", BLOCK, None)),
    ]


def mxfp4_cases(rng: np.random.Generator, rows: int, columns: int) -> list[Case]:
    """Random nibbles under scales of the size that weights have."""
    groups = columns // GROUP
    blocks = rng.integers(0, 256, (rows, groups, GROUP // 2), np.uint8)
    scales = rng.integers(115, 125, (rows, groups), np.uint8)
    values = mxfp4.decode(blocks, scales, "bfloat16")
    returned(mxfp4.encode(values, "bfloat16", scales), (blocks, scales))
    return [
        Case("MXFP4 decode", lambda: mxfp4.decode(blocks, scales, "bfloat16")),
        Case("MXFP4 encode, kept scales", lambda: mxfp4.encode(values, "bfloat16", scales)),
        Case("MXFP4 encode, new scales", lambda: mxfp4.encode(values, "bfloat16", None)),
    ]


def int4_cases(rng: np.random.Generator, rows: int, columns: int) -> list[Case]:
    """Random words and bfloat16 scales of the size that weights have."""
    packed = rng.integers(0, 2**32, (rows, columns // 8), np.uint32)
    scales = rng.integers(0x3C00, 0x3C80, (rows, columns // GROUP), np.uint16)

    def decode() -> NDArray[Any]:
        return int4.decode(packed, scales, "bfloat16", columns, GROUP, "bfloat16")

    values = decode()
    returned(int4.encode(values, "bfloat16", GROUP, scales, "bfloat16"), (packed, scales))
    return [
        Case("INT4 decode", decode),
        Case("INT4 encode, kept scales", lambda: int4.encode(values, "bfloat16", GROUP, scales, "bfloat16")),
        Case("INT4 encode, new scales", lambda: int4.encode(values, "bfloat16", GROUP, None, "bfloat16")),
    ]


def strided_cases(rng: np.random.Generator, rows: int, columns: int) -> list[Case]:
    """GPT-OSS experts: a matrix turned and turned back, whole and by the 1 MiB that an import writes at once."""
    matrix, out = rng.integers(0, 1 << 16, rows * columns, np.uint16), np.zeros(rows * columns, np.uint16)
    few = max(1, (1 << 19) // rows)
    turned = strided.view(matrix, 0, (columns, rows), (1, columns))
    back = strided.view(out, 0, (columns, rows), (1, columns))
    halves = [strided.view(matrix, n, (columns // 2, rows), (2, columns)) for n in (0, 1)]
    parts = [slice(first, first + few) for first in range(0, columns // 2, few)]

    def pieces() -> None:
        for half in halves:
            for part in parts:
                strided.copy(np.empty_like(half[part], order="C"), half[part])

    return [
        Case("transpose", lambda: strided.copy(out.reshape(columns, rows), turned)),
        Case("transpose back", lambda: strided.copy(back, matrix.reshape(columns, rows))),
        Case("transpose gate and up, 1 MiB at a time", pieces),
    ]


def returned(found: tuple[NDArray[Any], ...], stored: tuple[NDArray[Any], ...]) -> None:
    """Ends the run with status 5 if encoding did not give back what was stored."""
    if not all(np.array_equal(one, other) for one, other in zip(found, stored, strict=True)):
        raise SystemExit(5)


def copy_case(rows: int, columns: int) -> Case:
    """memcpy of the values into memory touched before."""
    source, target = np.ones((rows, columns), np.uint16), np.zeros((rows, columns), np.uint16)
    return Case("memcpy", lambda: np.copyto(target, source))


def seconds(case: Case, library: Any) -> float:
    """The time that this thread needs for one call, with the compiled loops or without them."""
    native.LIBRARY = library
    begun = time.thread_time()
    case.work()
    return time.thread_time() - begun


def run_rounds(cases: list[Case], count: int) -> dict[str, list[list[float]]]:
    """Times of all cases in turn, compiled and in NumPy, as often as asked, after one round that is not counted."""
    ways = [native.LIBRARY, None]
    rounds = [{case.name: [seconds(case, way) for way in ways] for case in cases} for _ in range(count + 1)]
    return {
        case.name: [list(times) for times in zip(*(one[case.name] for one in rounds[1:]), strict=True)]
        for case in cases
    }


def row(name: str, ways: list[list[float]], size: int) -> str:
    """One line of the table.

    >>> row("x", [[1.0, 2.0, 4.0]], 2 * 10**9)
    '| x | 2.00 | 1.00 |'
    """
    cells = [f"{size / time / 1e9:.2f}" for times in ways for time in (min(times), statistics.median(times))]
    return f"| {' | '.join([name, *cells])} |"


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--columns", type=int, default=7168, help="a multiple of 32")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if options.columns % GROUP or min(options.rows, options.columns, options.rounds) < 1:
        parser.error("sizes and rounds must be at least 1, and --columns a multiple of 32")
    return options


def main() -> None:
    """Prints the table, in Markdown."""
    options = parse()
    rng, shape = np.random.default_rng(options.seed), (options.rows, options.columns)
    kinds = (fp8_cases, mxfp4_cases, int4_cases, strided_cases)
    cases = [copy_case(*shape), *(case for kind in kinds for case in kind(rng, *shape))]
    rounds = run_rounds(cases, options.rounds)
    size = options.rows * options.columns * 2
    print(f"{size / 1e6:.0f} MB of bfloat16 values [{options.rows}, {options.columns}], {options.rounds} rounds\n")
    print("| kernel, GB/s | compiled: best | median | NumPy: best | median |\n| --- | --- | --- | --- | --- |")
    print("\n".join(row(name, ways, size) for name, ways in rounds.items()))


if __name__ == "__main__":
    main()
