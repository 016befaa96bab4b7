"""Times the quantisation kernels on one core: GB/s of bfloat16 values, beside `memcpy` of the same bytes.

Rounds are interleaved (copy, first kernel, second kernel, …) so that a slow moment of the machine meets all alike; the
table shows the best round and the median. Every case also checks that encoding returns the stored bytes.

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

from transcoder.kernels import fp8, int4, mxfp4

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


def returned(found: tuple[NDArray[Any], ...], stored: tuple[NDArray[Any], ...]) -> None:
    """Ends the run with status 5 if encoding did not give back what was stored."""
    if not all(np.array_equal(one, other) for one, other in zip(found, stored, strict=True)):
        raise SystemExit(5)


def copy_case(rows: int, columns: int) -> Case:
    """memcpy of the values into memory touched before."""
    source, target = np.ones((rows, columns), np.uint16), np.zeros((rows, columns), np.uint16)
    return Case("memcpy", lambda: np.copyto(target, source))


def seconds(case: Case) -> float:
    """The wall time of one call."""
    begun = time.perf_counter()
    case.work()
    return time.perf_counter() - begun


def run_rounds(cases: list[Case], count: int) -> dict[str, list[float]]:
    """Times of all cases in turn, as often as asked, after one round that is not counted."""
    rounds = [{case.name: seconds(case) for case in cases} for _ in range(count + 1)]
    return {case.name: [times[case.name] for times in rounds[1:]] for case in cases}


def row(name: str, times: list[float], size: int) -> str:
    """One line of the table.

    >>> row("x", [1.0, 2.0, 4.0], 2 * 10**9)
    '| x | 2.00 | 1.00 |'
    """
    return f"| {name} | {size / min(times) / 1e9:.2f} | {size / statistics.median(times) / 1e9:.2f} |"


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
    cases = [copy_case(*shape), *fp8_cases(rng, *shape), *mxfp4_cases(rng, *shape), *int4_cases(rng, *shape)]
    rounds = run_rounds(cases, options.rounds)
    size = options.rows * options.columns * 2
    print(f"{size / 1e6:.0f} MB of bfloat16 values [{options.rows}, {options.columns}], {options.rounds} rounds\n")
    print("| kernel | GB/s, best | GB/s, median |\n| --- | --- | --- |")
    print("\n".join(row(name, times, size) for name, times in rounds.items()))


if __name__ == "__main__":
    main()
