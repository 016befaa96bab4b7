"""Times planning an import: real names, dtypes and shapes in safetensors files whose payloads are holes.

The files take a few KiB to MiB on disk. Every round is a fresh process, timed as a whole and, inside it, without
imports. Llama-3-70B, or any model of `tests/published.py`:

    python benchmarks/plan.py --tp 8 --pp 4
    python benchmarks/plan.py --model DeepSeek-V3 --tp 8 --pp 16 --ep 32
"""

from __future__ import annotations

import argparse
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from synthetic import Shape, Tensor, configuration, header, pack, size, tensors, write_json

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from hollow import measure as cost_of
from hollow import write_sparse
from published import RELEASES, config_of

LLAMA_3_70B = Shape(layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256)
SHARD = 5_000_000_000  # bytes
LLAMA = "Llama-3-70B"
STEPS = ("plan and proof, without imports", ".metadata", "transcode plan", "transcode --help")


def write_model(folder: Path, name: str) -> int:
    """Writes the files of a model without payloads; returns the number of stored tensors."""
    if name == LLAMA:
        return write_hollow(folder, LLAMA_3_70B)
    write_sparse(config_of(name), folder, RELEASES[name].files)
    return RELEASES[name].tensors


def write_hollow(folder: Path, shape: Shape) -> int:
    """Writes config, index and shards without payloads; returns the number of tensors."""
    listed = [*tensors(shape), ("lm_head.weight", (shape.vocabulary, shape.hidden))]
    shards = pack(listed, SHARD)
    names = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards, strict=True):
        write_hollow_shard(folder / name, shard)
    where = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(map(size, listed))}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    write_json(folder / "config.json", configuration(shape) | {"tie_word_embeddings": False})
    return len(listed)


def write_hollow_shard(path: Path, shard: list[Tensor]) -> None:
    """A header, then a hole as long as the payload."""
    with path.open("wb") as file:
        file.write(header(shard))
        file.truncate(file.tell() + sum(map(size, shard)))


def run(command: list[str]) -> tuple[float, str]:
    """Wall seconds of a command, and what it wrote to standard output."""
    begun = time.perf_counter()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    if not done.stdout:
        raise SystemExit(f"{shlex.join(command)} wrote nothing: is it the right command?")
    return time.perf_counter() - begun, done.stdout


def measure(folder: Path, options: argparse.Namespace) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """The rounds, interleaved: seconds of each step, and the last round's sizes."""
    transcode, cost = shlex.split(options.transcode), dict[str, Any]()
    grid = {name: getattr(options, name) for name in ("tp", "pp", "ep")}
    flags = [text for name, value in grid.items() for text in (f"--{name}", str(value))]
    seconds: dict[str, list[float]] = {step: [] for step in STEPS}
    for _ in range(options.rounds):
        cost = cost_of(folder, grid)
        whole = run([*transcode, "plan", str(folder), *flags])[0]
        found = (cost["plan"], cost["metadata"], whole, run([*transcode, "--help"])[0])
        for step, value in zip(STEPS, found, strict=True):
            seconds[step].append(value)
    return seconds, cost


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=LLAMA, choices=[LLAMA, *RELEASES])
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--ep", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transcode", default="transcode", help="the command to time")
    return parser.parse_args()


def main() -> None:
    """Writes the hollow checkpoint into a temporary folder, times the rounds, prints the table."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        count = write_model(Path(temporary), options.model)
        seconds, cost = measure(Path(temporary), options)
    grid = f"TP {options.tp} x PP {options.pp} x EP {options.ep}"
    print(f"{options.model}, {count:,} tensors, {grid}: {cost['chunks']:,} chunks, {options.rounds} rounds")
    print(f".metadata has {cost['size']:,} bytes; peak resident memory {cost['peak'] / 2**20:.0f} MiB\n")
    print("| step | median s | lowest to highest |\n| --- | --- | --- |")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} to {max(found):.3f} |")


if __name__ == "__main__":
    main()
