"""Times planning a Llama-3-70B import: real names and shapes in safetensors files whose payloads are holes.

The files take a few KiB on disk. Every round is a fresh process, timed as a whole and, inside it, without imports.

    python benchmarks/plan.py --tp 8 --pp 4
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

from synthetic import Shape, Tensor, configuration, header, pack, size, tensors, write_json

LLAMA_3_70B = Shape(layers=80, hidden=8192, ffn=28672, heads=64, kv_heads=8, head_dim=128, vocabulary=128256)
SHARD = 5_000_000_000  # bytes
INSIDE = """
import sys, time
from transcoder import api, importing
begun = time.perf_counter()
plan = api.plan_hf2mcore(sys.argv[1], tp=int(sys.argv[2]), pp=int(sys.argv[3]))
print(time.perf_counter() - begun)
"""


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
    return time.perf_counter() - begun, done.stdout


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """The rounds, interleaved: the planning function, the whole `plan` command, and `--help`."""
    transcode = shlex.split(options.transcode)
    grid = ["--tp", str(options.tp), "--pp", str(options.pp)]
    seconds: dict[str, list[float]] = {
        "plan_hf2mcore, without imports": [],
        "transcode plan": [],
        "transcode --help": [],
    }
    for _ in range(options.rounds):
        inside = run([sys.executable, "-c", INSIDE, str(folder), str(options.tp), str(options.pp)])[1]
        seconds["plan_hf2mcore, without imports"].append(float(inside))
        seconds["transcode plan"].append(run([*transcode, "plan", str(folder), *grid])[0])
        seconds["transcode --help"].append(run([*transcode, "--help"])[0])
    return seconds


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--tp", type=int, default=8)
    parser.add_argument("--pp", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transcode", default="transcode", help="the command to time")
    return parser.parse_args()


def main() -> None:
    """Writes the hollow checkpoint into a temporary folder, times the rounds, prints the table."""
    options = parse()
    with tempfile.TemporaryDirectory() as temporary:
        count = write_hollow(Path(temporary), LLAMA_3_70B)
        seconds = measure(Path(temporary), options)
    print(f"Llama-3-70B, {count} tensors, TP {options.tp} x PP {options.pp}, {options.rounds} rounds\n")
    print("| step | median s | lowest to highest |\n| --- | --- | --- |")
    for name, found in seconds.items():
        print(f"| {name} | {statistics.median(found):.3f} | {min(found):.3f} to {max(found):.3f} |")


if __name__ == "__main__":
    main()
