"""Times conversions against `cp -r` of the same checkpoint: wall time, CPU time and anonymous memory.

Rounds are interleaved (copy, import, export, copy, …) so that a slow moment of the machine meets all three alike.
Every timed step ends when its bytes are on disk, unless --no-sync. Linux only: memory comes from /proc.

    python benchmarks/convert.py work/llama-1b --workdir work/bench --rounds 5
"""

from __future__ import annotations

import argparse
import os
import re
import resource
import shlex
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

INTERVAL = 0.020
INBLOCK = 512  # bytes; getrusage(2) counts in them, whatever the device
ANONYMOUS = re.compile(rb"^Anonymous:\s+(\d+) kB", re.MULTILINE)


@dataclass(frozen=True)
class Sample:
    """One timed step; `anonymous` is 0 where memory was not sampled; `read` are bytes that came from the device."""

    wall: float
    cpu: float
    anonymous: int
    read: int = 0


@dataclass(frozen=True)
class Step:
    """One command and the folder it makes."""

    name: str
    command: list[str]
    output: Path


def anonymous_bytes(rollup: bytes) -> int:
    """The anonymous bytes in the text of smaps_rollup.

    >>> anonymous_bytes(b"Rss:  900 kB\\nAnonymous:       12 kB\\nAnonHugePages:  4 kB\\n")
    12288
    """
    found = ANONYMOUS.search(rollup)
    return int(found[1]) * 1024 if found else 0


def children(pid: int) -> list[int]:
    """The process and all its descendants that are alive now."""
    found = [pid]
    for listing in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            found += [each for child in listing.read_text().split() for each in children(int(child))]
        except OSError:
            continue
    return found


def anonymous_now(pid: int) -> int:
    """The anonymous bytes of a process and its descendants; those that just ended count nothing."""
    total = 0
    for each in children(pid):
        try:
            total += anonymous_bytes(Path(f"/proc/{each}/smaps_rollup").read_bytes())
        except OSError:
            continue
    return total


class MemoryWatch:
    """Samples a process tree every 20 ms and keeps the highest sum; peaks shorter than that can be missed."""

    def __init__(self, pid: int) -> None:
        """Starts the sampling thread."""
        self.peak = 0
        self._pid = pid
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while True:
            self.peak = max(self.peak, anonymous_now(self._pid))
            if self._done.wait(INTERVAL):
                return

    def stop(self) -> int:
        """Ends the sampling; returns the peak in bytes."""
        self._done.set()
        self._thread.join()
        return self.peak


def execute(command: list[str], memory: bool) -> tuple[resource.struct_rusage, int]:
    """Runs a command; returns what it used, its children included, and its peak anonymous bytes."""
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE) as process:
        watch = MemoryWatch(process.pid) if memory else None
        assert process.stderr is not None
        messages = process.stderr.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        peak = watch.stop() if watch else 0
    if process.returncode:
        sys.stderr.write(messages.decode(errors="replace"))
        raise SystemExit(f"exit {process.returncode}: {shlex.join(command)}")
    return usage, peak


def recycle(folder: Path, size: int) -> None:
    """Touches `size` bytes of page cache and frees them again, so that every step finds memory in the same state.

    A virtual machine returns free memory to its host; the first to touch it again pays several times a write's price.
    """
    ballast, block = folder / "ballast", bytes(1 << 20)
    with ballast.open("wb", buffering=0) as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    ballast.unlink()


def forget(folder: Path) -> None:
    """Drops every file below a folder from the page cache; what was written must be on disk already."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def measure(step: Step, size: int, sync: bool, memory: bool, cold: Path | None = None) -> Sample:
    """Times one step into a fresh folder, with nothing left to flush from before and nothing of `cold` cached."""
    shutil.rmtree(step.output, ignore_errors=True)
    os.sync()
    recycle(step.output.parent, size)
    if cold:
        forget(cold)
    begun = time.perf_counter()
    usage, peak = execute(step.command, memory)
    if sync:
        os.sync()
    wall = time.perf_counter() - begun
    return Sample(wall, usage.ru_utime + usage.ru_stime, peak, usage.ru_inblock * INBLOCK)


def steps(source: Path, workdir: Path, options: argparse.Namespace) -> list[Step]:
    """Copy, import and export; the export reads what the import wrote."""
    copied, megatron, back = workdir / "copy", workdir / "megatron", workdir / "huggingface"
    transcode = shlex.split(options.transcode)
    extra = shlex.split(options.extra)
    if options.no_sync:
        extra.append("--no-sync")
    grid = ["--tp", str(options.tp), "--pp", str(options.pp)]
    return [
        Step("cp -r", ["cp", "-r", str(source), str(copied)], copied),
        Step("hf2mcore", [*transcode, "hf2mcore", str(source), str(megatron), *grid, *extra], megatron),
        Step("mcore2hf", [*transcode, "mcore2hf", str(megatron), str(back), *extra], back),
    ]


def folder_bytes(folder: Path) -> int:
    """The bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def warm(folder: Path) -> None:
    """Reads every file once, so that no step pays for the first read from disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb", buffering=0) as file:
                while file.read(16 << 20):
                    pass


def same_files(source: Path, back: Path) -> bool:
    """Whether `diff -r` finds no difference."""
    return subprocess.run(["diff", "-rq", str(source), str(back)], check=False).returncode == 0


def row(name: str, samples: list[Sample], base: list[Sample], size: int, memory: bool) -> str:
    """One line of the table: medians; the ratio is the median over rounds of this step's time to the copy's.

    >>> row("x", [Sample(3.0, 1.0, 1 << 20)], [Sample(2.0, 1.0, 0)], 10**9, True)
    '| x | 3.00 | 1.50 (1.50 to 1.50) | 1.00 | 1 MiB |'
    """
    wall = statistics.median(sample.wall for sample in samples)
    cpu = statistics.median(sample.cpu for sample in samples) / (size / 1e9)
    ratios = [sample.wall / copy.wall for sample, copy in zip(samples, base, strict=True)]
    peak = f"{max(sample.anonymous for sample in samples) / (1 << 20):.0f} MiB" if memory else "-"
    spread = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    return f"| {name} | {wall:.2f} | {spread} | {cpu:.2f} | {peak} |"


def report(rounds: dict[str, list[Sample]], size: int, memory: bool) -> str:
    """The table, in Markdown."""
    lines = [
        "| step | wall s | wall / cp -r (range) | CPU s/GB | peak anonymous |",
        "| --- | --- | --- | --- | --- |",
    ]
    lines += [row(name, samples, rounds["cp -r"], size, memory) for name, samples in rounds.items()]
    return "\n".join(lines)


def run_rounds(plan: list[Step], size: int, options: argparse.Namespace) -> dict[str, list[Sample]]:
    """Runs all steps in turn, as often as asked; prints every sample as it comes."""
    rounds: dict[str, list[Sample]] = {step.name: [] for step in plan}
    for number in range(1, options.rounds + 1):
        for step in plan:
            sample = measure(step, size, not options.no_sync, options.memory)
            rounds[step.name].append(sample)
            print(f"round {number}  {step.name:9s} {sample.wall:7.2f} s  cpu {sample.cpu:6.2f} s", flush=True)
            if step is plan[0] and not options.keep:
                shutil.rmtree(step.output)  # no step reads the copy; less crowds the page cache
    return rounds


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path, help="a Hugging Face checkpoint")
    parser.add_argument("--workdir", type=Path, required=True, help="holds three copies; on the same disk")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--no-sync", action="store_true", help="leave flushing to the kernel, here and in transcode")
    parser.add_argument("--memory", action="store_true", help="sample memory every 20 ms; this costs some time")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--pp", type=int, default=2)
    parser.add_argument("--transcode", default="transcode", help="the command to time")
    parser.add_argument("--extra", default="", help="further options for both conversions, e.g. '--workers 2'")
    parser.add_argument("--keep", action="store_true", help="leave the three folders in the work directory")
    options = parser.parse_args()
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def main() -> None:
    """Runs the rounds, checks that the last export equals the source, prints the table."""
    options = parse()
    options.workdir.mkdir(parents=True, exist_ok=True)
    size = folder_bytes(options.source)
    plan = steps(options.source, options.workdir, options)
    warm(options.source)
    rounds = run_rounds(plan, size, options)
    equal = same_files(options.source, plan[-1].output)
    print(f"\n{size / 1e9:.2f} GB, {options.rounds} rounds, TP {options.tp} x PP {options.pp}; medians\n")
    print(report(rounds, size, options.memory))
    print(f"\nThe last export {'equals' if equal else 'DIFFERS FROM'} the source (diff -r).")
    if not options.keep:
        for step in plan:
            shutil.rmtree(step.output, ignore_errors=True)
    if not equal:
        raise SystemExit(5)


if __name__ == "__main__":
    main()
