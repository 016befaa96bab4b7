"""The rows that no copy is needed for: kernels, planning, start-up."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import plan as planning
from ratios import Result
from rounds import ROOT, Bench
from rows import FP8, MXFP4, PLAN, START_UP, TRANSPOSES

import kernels

EXAMPLE = ROOT / "examples" / "tiny-llama"
# kernel of kernels.py: the row, what is demanded compiled and of NumPy
KERNELS: dict[str, tuple[str, float | None, float | None]] = {
    "FP8 decode, 128 x 128": (FP8, 5.0, 1.2),
    "FP8 encode, kept scales": (FP8, 3.0, None),
    "FP8 encode, new scales": (FP8, None, None),
    "MXFP4 decode": (MXFP4, 6.0, 1.8),
    "transpose": (TRANSPOSES, 3.0, 0.9),
    "transpose back": (TRANSPOSES, 3.0, 0.9),
    "transpose gate and up, 1 MiB at a time": (TRANSPOSES, 3.0, 0.9),
}
# Times the first write into a target file from inside the process: tracing from outside slows every call.
FIRST_BYTE = """
import os, runpy, sys, time
def timed(call, place):
    def first(*arguments, **named):
        written = call(*arguments, **named)
        if os.readlink(f"/proc/self/fd/{arguments[place]}").endswith((".distcp", ".safetensors")) and not found:
            found.append(time.monotonic())
        return written
    return first
found = []
for name, place in {"write": 0, "pwrite": 0, "pwritev": 0, "writev": 0, "copy_file_range": 1, "sendfile": 0}.items():
    setattr(os, name, timed(getattr(os, name), place))
target = sys.argv.pop(1)
try:
    runpy.run_module("transcoder", run_name="__main__", alter_sys=True)
finally:
    open(target, "w").write(str(found[0] if found else "nothing"))
"""


def run_kernels(bench: Bench) -> list[Result]:
    """GB/s of bfloat16 values on one thread, by the thread's own time; beside them memcpy of the same bytes."""
    rng, shape = np.random.default_rng(0), (512, 1792) if bench.quick else (2048, 7168)
    kinds = (kernels.fp8_cases, kernels.mxfp4_cases, kernels.strided_cases)
    cases = [kernels.copy_case(*shape), *(case for kind in kinds for case in kind(rng, *shape))]
    library = kernels.native.LIBRARY
    found = kernels.run_rounds([case for case in cases if case.name in {"memcpy", *KERNELS}], bench.rounds)
    kernels.native.LIBRARY = library
    speeds = {name: [[speed(shape, time) for time in times] for times in ways] for name, ways in found.items()}
    results = []
    for name, (row, compiled, plain) in KERNELS.items():
        for way, target, samples in zip(("compiled", "NumPy"), (compiled, plain), speeds[name], strict=True):
            if way == "NumPy" or library is not None:
                copies = speeds["memcpy"][0]
                results.append(Result(row, f"{name}, {way}", "GB/s", samples, target, copies, "memcpy", higher=True))
    return results


def speed(shape: tuple[int, int], seconds: float) -> float:
    """GB/s of a matrix of two-byte values."""
    return 2 * shape[0] * shape[1] / 1e9 / seconds


def run_plan(bench: Bench) -> list[Result]:
    """DeepSeek-V3 at TP 8, PP 16, EP 32, in fresh processes; a small model when quick."""
    model, grid = (planning.LLAMA, (8, 4, 1)) if bench.quick else ("DeepSeek-V3", (8, 16, 32))
    with tempfile.TemporaryDirectory() as place:
        planning.write_model(Path(place), model)
        sizes = dict(zip(("tp", "pp", "ep"), grid, strict=True))
        costs = [planning.cost_of(Path(place), sizes) for _ in range(bench.rounds)]
        options = SimpleNamespace(**sizes, rounds=bench.rounds, transcode=" ".join(bench.transcode))
        whole = command_walls([*bench.transcode, "plan", place, *flags(vars(options))], bench.rounds)
    name = f"{model}, TP {grid[0]} PP {grid[1]} EP {grid[2]}"
    seconds = {key: [cost[key] for cost in costs] for key in ("plan", "metadata")}
    peaks = [cost["peak"] / 2**20 for cost in costs]
    return [
        Result(PLAN, f"{name}: plan and proof", "s", seconds["plan"], 1.5),
        Result(PLAN, f"{name}: peak resident, .metadata included", "MiB", peaks, 150),
        Result(PLAN, f"{name}: .metadata", "s", seconds["metadata"], 1.0),
        Result(PLAN, f"{name}: `transcode plan` as a whole", "s", whole),
    ]


def flags(grid: dict[str, object]) -> list[str]:
    """The parallel sizes as options."""
    return [text for name in ("tp", "pp", "ep") for text in (f"--{name}", str(grid[name]))]


def command_walls(command: list[str], rounds: int, status: int = 0) -> list[float]:
    """Wall seconds of fresh processes, after one that is not counted."""
    walls = []
    for _ in range(rounds + 1):
        begun = time.perf_counter()
        done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
        walls.append(time.perf_counter() - begun)
        if (done.returncode != 0) != (status != 0):
            raise SystemExit(f"exit {done.returncode}: {' '.join(command)}\n{done.stderr.decode(errors='replace')}")
    return walls[1:]


def imports_numpy(bench: Bench, arguments: list[str]) -> bool:
    """Whether the command imports NumPy."""
    traced = [sys.executable, "-X", "importtime", "-m", "transcoder", *arguments]
    done = subprocess.run(traced, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    return any(line.split("|")[-1].strip() == "numpy" for line in done.stderr.splitlines())


def run_start(bench: Bench) -> list[Result]:
    """Commands that move nothing, and the time until the first byte of a conversion is in its file."""
    rounds, folder = max(5, bench.rounds), bench.out / "megatron"
    shutil.rmtree(bench.out, ignore_errors=True)
    bench.out.mkdir(parents=True)
    subprocess.run([*bench.transcode, "hf2mcore", str(EXAMPLE), str(folder), "--quiet"], check=True)
    asked = {
        "transcode --help": (["--help"], 0),
        "an error": (["hf2mcore", str(bench.out / "missing"), str(bench.out / "x")], 1),
        "plan": (["plan", str(EXAMPLE), "--tp", "2", "--pp", "2"], 0),
        "inspect": (["inspect", str(folder)], 0),
    }
    bare = command_walls([sys.executable, "-c", "import click, json, re, mmap, dataclasses"], rounds)
    results = []
    for name, (arguments, status) in asked.items():
        note = "imports NumPy" if imports_numpy(bench, arguments) else "without NumPy"
        walls = command_walls([*bench.transcode, *arguments], rounds, status)
        results.append(Result(START_UP, f"{name}, {note}", "s", walls, 0.1, bare, "click, json, re, mmap imported"))
    for name, arguments in (("import", ["hf2mcore", str(EXAMPLE)]), ("export", ["mcore2hf", str(folder)])):
        found = [first_byte(bench, arguments) for _ in range(rounds + 1)][1:]
        results.append(Result(START_UP, f"first byte moved, {name}", "s", found, 0.25, bare, "as above"))
    shutil.rmtree(bench.out)
    return results


def first_byte(bench: Bench, arguments: list[str]) -> float:
    """Seconds from starting the process until its first write into a target file returned."""
    target, noted = bench.out / "first", bench.out / "noted"
    shutil.rmtree(target, ignore_errors=True)
    command = [sys.executable, "-c", FIRST_BYTE, str(noted), *arguments, str(target), "--no-sync", "--quiet"]
    begun = time.monotonic()
    subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"})
    text = noted.read_text()
    if text == "nothing":
        raise SystemExit("no write into a target file was seen: which call moves the bytes now? See FIRST_BYTE")
    return float(text) - begun
