"""Conversions against copies, in interleaved rounds: copy, import, export, bare loops, and again."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from convert import Sample, Step, folder_bytes, measure, recycle, same_files, warm
from ratios import START, Result, paired, slow_rounds
from rows import CPU, Variant
from sources import make

ROOT = Path(__file__).resolve().parent.parent
WAYS = {"hf2mcore": "import", "mcore2hf": "export"}
BARE = (1, 2)  # processes
Samples = dict[str, list[Sample]]


@dataclass
class Bench:
    """Where and how the suite measures. transcode: the command; quick: small sources; say: told how it goes."""

    folder: Path
    rounds: int
    quick: bool
    transcode: list[str] = field(default_factory=lambda: [sys.executable, "-m", "transcoder"])

    @property
    def sources(self) -> Path:
        """Beside the results, so on the same disk."""
        return self.folder / "sources"

    @property
    def out(self) -> Path:
        """What is written and removed again."""
        return self.folder / "out"

    def source(self, name: str) -> Path:
        """Made when it is first asked for, and read once."""
        folder = make(name, self.sources, self.quick)
        warm(folder)
        return folder

    def drop(self, name: str) -> None:
        """Gives a source's space back."""
        shutil.rmtree(self.sources / name, ignore_errors=True)


def say(text: str) -> None:
    """How it goes, beside the table."""
    print(text, file=sys.stderr, flush=True)


def steps(bench: Bench, variant: Variant) -> list[Step]:
    """Copy, import, export."""
    source, copied = bench.sources / variant.source, bench.out / "copy"
    megatron, back = bench.out / "megatron", bench.out / "huggingface"
    there = [str(source), str(megatron), *variant.grid_options]
    return [
        Step("cp", ["cp", "-r", str(source), str(copied)], copied),
        Step("hf2mcore", [*bench.transcode, "hf2mcore", *there, *variant.options, "--quiet"], megatron),
        Step("mcore2hf", [*bench.transcode, "mcore2hf", str(megatron), str(back), *variant.options, "--quiet"], back),
    ]


def one_round(bench: Bench, variant: Variant, size: int) -> dict[str, Sample]:
    """A sample of every step; the copy is removed at once, so that less crowds the page cache."""
    found = {}
    durable, planned = variant.mode == "durable", steps(bench, variant)
    for step in planned:
        cold = None
        if variant.mode == "cold":
            cold = planned[1].output if step.name == "mcore2hf" else bench.sources / variant.source
        found[step.name] = measure(step, size, durable, memory=False, cold=cold)
        if step.name == "cp":
            shutil.rmtree(step.output)
    say(f"  {variant.name}: " + ", ".join(f"{name} {sample.wall:.2f} s" for name, sample in found.items()))
    return found


def bare(bench: Bench, source: str, size: int) -> dict[str, float]:
    """Seconds of the bare loops, by processes and checksum."""
    found, target = {}, bench.out / "bare"
    for count in BARE:
        for crc in (False, True):
            recycle(bench.out, size)
            command = [sys.executable, ROOT / "benchmarks" / "limits.py", bench.sources / source, target]
            options = ["--processes", str(count), *(["--crc"] if crc else [])]
            text = subprocess.run([*command, *options], check=True, stdout=subprocess.PIPE, text=True).stdout
            found[f"{count}{' crc' if crc else ''}"] = float(text)
            shutil.rmtree(target)
    return found


def run(bench: Bench, variants: Sequence[Variant]) -> list[Result]:
    """All rows of a group: source by source, so that only one is on disk."""
    results = []
    for source, some in groupby(sorted(variants, key=lambda variant: variant.source), lambda variant: variant.source):
        bench.source(source)
        results += run_source(bench, source, list(some))
        bench.drop(source)
        shutil.rmtree(bench.out)
    return results


def run_source(bench: Bench, source: str, variants: list[Variant]) -> list[Result]:
    """The variants of one source, interleaved, after one round that is dropped."""
    bench.out.mkdir(parents=True, exist_ok=True)
    size = folder_bytes(bench.sources / source)
    rounds: list[list[dict[str, Sample]]] = []
    loops: list[dict[str, float]] = []
    for number in range(bench.rounds + 1):
        say(f"{source}, {size / 1e9:.2f} GB, " + (f"round {number} of {bench.rounds}" if number else "warm-up"))
        rounds.append([one_round(bench, variant, size) for variant in variants])
        loops.append(bare(bench, source, size))
        if not number and not same_files(bench.sources / source, bench.out / "huggingface"):
            raise SystemExit(f"{variants[-1].name}: the export differs from the source (diff -r)")
    results = []
    for place, variant in enumerate(variants):
        samples = {name: [found[place][name] for found in rounds[1:]] for name in ("cp", *WAYS)}
        results += rows_of(variant, samples, loops[1:], size)
    return results


def rows_of(variant: Variant, samples: Samples, loops: list[dict[str, float]], size: int) -> list[Result]:
    """Wall and CPU of both directions; what a cold source read."""
    copies = [sample.wall for sample in samples["cp"]]
    slow, results = slow_rounds(copies), []
    results.append(Result(variant.issue, f"{variant.name}: cp -r", "s", copies, slow=slow))
    for name, way in WAYS.items():
        walls = [sample.wall for sample in samples[name]]
        start = START if variant.mode == "warm" else 0.0
        ratios = paired(walls, copies, start)
        unit = f"{'(s - 0.3)' if start else 's'} / cp{' + sync' if variant.mode == 'durable' else ''}"
        limit, why = limit_of(variant, loops, copies)
        results.append(
            Result(variant.issue, f"{variant.name}: {way}", unit, ratios, variant.target, limit, why, slow=slow)
        )
        results += cpu_rows(variant, samples, name, slow, size)
        if variant.mode == "cold":
            results.append(read_row(variant, samples[name], way, size))
    return results


def limit_of(variant: Variant, loops: list[dict[str, float]], copies: list[float]) -> tuple[list[float], str]:
    """The bare loop with checksums, by the copy of its round; only where source and target are in the page cache."""
    if variant.mode != "warm":
        return [], ""
    count = variant.workers or 2
    return paired([loop[f"{count} crc"] for loop in loops], copies), f"bare loop with CRC, {count} process(es)"


def cpu_rows(variant: Variant, samples: Samples, name: str, slow: list[bool], size: int) -> list[Result]:
    """CPU seconds by those of the copy, and by the GB."""
    ours, copies = ([sample.cpu for sample in samples[each]] for each in (name, "cp"))
    title, giga = f"{variant.name}: {WAYS[name]}, CPU", size / 1e9
    per = Result(
        CPU, title, "s/GB", [cpu / giga for cpu in ours], None, [cpu / giga for cpu in copies], "cp", slow=slow
    )
    if variant.cpu is None:
        return [per]
    return [Result(CPU, title, "CPU s / those of cp", paired(ours, copies), variant.cpu, slow=slow), per]


def read_row(variant: Variant, samples: list[Sample], way: str, size: int) -> Result:
    """How often every source byte came from the device: pages are read whole, so a little more than once."""
    times = [sample.read / size for sample in samples]
    return Result(variant.issue, f"{variant.name}: {way}", "bytes read / source", times, 1.01, [1.0], "once")
