"""How cost and memory grow: with the bytes, with the number of tensors."""

from __future__ import annotations

import shutil
import statistics
from collections.abc import Callable

from convert import Step, folder_bytes, measure
from ratios import Result, exponent, line
from rounds import WAYS, Bench, say, steps
from rows import COUNTS, FOUR, GROWTH, MEMORY, SIZES, Variant
from sources import names

TENSOR_TARGET = 50.0  # µs
POWER_TARGET = 1.1  # the power of the bytes with which seconds may grow; 1 is linear
FLAT = 1.2  # the peak of the largest model over that of the smallest
PEAK = 100.0  # MiB
SMALLEST = "tiny"
QUICK = 20  # --quick counts that many times fewer tensors
Walls = dict[str, dict[str, list[float]]]  # source: step: seconds


def timed(bench: Bench, sources: list[str], grid: tuple[int, int, int]) -> tuple[Walls, dict[str, int]]:
    """Seconds of copy, import and export of every source in interleaved rounds, the first dropped; bytes of each."""
    sizes = {name: folder_bytes(bench.source(name)) for name in sources}
    bench.out.mkdir(parents=True, exist_ok=True)
    walls: Walls = {name: {step: [] for step in ("cp", *WAYS)} for name in sources}
    for number in range(bench.rounds + 1):
        for name in sources:
            for step in steps(bench, Variant(GROWTH, name, grid, 2, 0.0)):
                wall = measure(step, sizes[name], sync=False, memory=False).wall
                if number:
                    walls[name][step.name].append(wall)
                if step.name == "cp":
                    shutil.rmtree(step.output)
        say(f"  growth, round {number} of {bench.rounds}: {', '.join(sources)}")
    shutil.rmtree(bench.out)
    for name in sources:
        bench.drop(name)
    return walls, sizes


def run_growth(bench: Bench) -> list[Result]:
    """Powers of the bytes, and µs a tensor."""
    walls, sizes = timed(bench, [SMALLEST, *SIZES], FOUR)
    return [*by_bytes(walls, sizes), *by_tensors(bench)]


def per_round(walls: Walls, step: str, value: Callable[[dict[str, float]], float]) -> list[float]:
    """A value for each round, from the seconds of all sources in it."""
    count = len(next(iter(walls.values()))[step])
    return [value({name: found[step][number] for name, found in walls.items()}) for number in range(count)]


def by_bytes(walls: Walls, sizes: dict[str, int]) -> list[Result]:
    """The power with which seconds grow, those of a tiny model taken off; seconds per further GB; all points."""

    def power(seconds: dict[str, float]) -> float:
        return exponent([(sizes[name], max(1e-3, seconds[name] - seconds[SMALLEST])) for name in SIZES])

    def slope(seconds: dict[str, float]) -> float:
        return line([(sizes[name] / 1e9, seconds[name]) for name in SIZES])[0]

    results = []
    copies = per_round(walls, "cp", power), per_round(walls, "cp", slope)
    for step, way in WAYS.items():
        powers, slopes = per_round(walls, step, power), per_round(walls, step, slope)
        results.append(
            Result(GROWTH, f"power of the bytes, {way}", "1 is linear", powers, POWER_TARGET, copies[0], "cp")
        )
        results.append(Result(GROWTH, f"further bytes, {way}", "s/GB", slopes, None, copies[1], "cp"))
    for name in (SMALLEST, *SIZES):
        for step in ("cp", *WAYS):
            title = f"{sizes[name] / 1e9:.3f} GB, {WAYS.get(step, step)}"
            results.append(Result(GROWTH, title, "s", walls[name][step]))
    return results


def by_tensors(bench: Bench) -> list[Result]:
    """The slope of the line through the counts; every tensor has 128 bytes to 8 KiB."""
    counts = {names(count // (QUICK if bench.quick else 1)): count // (QUICK if bench.quick else 1) for count in COUNTS}
    walls, _ = timed(bench, list(counts), (1, 1, 1))
    results = []
    for step, way in WAYS.items():

        def slope(seconds: dict[str, float]) -> float:
            return 1e6 * line([(counts[name], second) for name, second in seconds.items()])[0]

        slopes = per_round(walls, step, slope)
        results.append(Result(GROWTH, f"further tensors, {way}", "us a tensor", slopes, TENSOR_TARGET))
        results += [
            Result(GROWTH, f"{count:,} tensors, {way}", "s", walls[name][step]) for name, count in counts.items()
        ]
    return results


def run_memory(bench: Bench) -> list[Result]:
    """The highest anonymous memory with defaults, sampled every 20 ms, of a small, a medium and a large model."""
    peaks: dict[str, dict[str, float]] = {step: {} for step in WAYS}
    for name in (SIZES[0], *SIZES[2:]):
        size = folder_bytes(bench.source(name))
        bench.out.mkdir(parents=True, exist_ok=True)
        for step in steps(bench, Variant(MEMORY, name, FOUR, None, 0.0))[1:]:
            peaks[step.name][name] = peak_of(step, size)
        shutil.rmtree(bench.out)
        bench.drop(name)
    results = []
    for step, way in WAYS.items():
        found = peaks[step]
        results += [Result(MEMORY, f"{name}, {way}", "MiB", [peak], PEAK) for name, peak in found.items()]
        flat = found[SIZES[-1]] / found[SIZES[0]]
        results.append(Result(MEMORY, f"{SIZES[-1]} / {SIZES[0]}, {way}", "ratio of peaks", [flat], FLAT))
    return results


def peak_of(step: Step, size: int) -> float:
    """MiB, the higher of two runs: a peak shorter than the sampling can be missed."""
    samples = [measure(step, size, sync=False, memory=True).anonymous for _ in range(2)]
    say(f"  memory of {step.name}: {statistics.fmean(samples) / 2**20:.0f} MiB")
    return max(samples) / 2**20
