"""Checkpoints of real headers over holes, and what it costs to plan their conversion."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from itertools import groupby
from math import prod
from pathlib import Path
from typing import Any

from published import BYTES, Config, Tensor, tensors

ROOT = Path(__file__).parent.parent


def write_sparse(config: Config, folder: Path, files: list[str]) -> int:
    """Config, index and `files` of about equal size: headers, then holes. Returns the bytes of the headers."""
    listed = list(tensors(config))
    total, done, places = sum(map(nbytes, listed)), 0, list[int]()
    for tensor in listed:
        places.append(done * len(files) // total)
        done += nbytes(tensor)
    shards = [[listed[i] for i in group] for _, group in groupby(range(len(listed)), places.__getitem__)]
    written = sum(write_shard(folder / file, shard) for file, shard in zip(files, shards, strict=True))
    where = {tensor[0]: file for file, shard in zip(files, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return written


def nbytes(tensor: Tensor) -> int:
    """Bytes of a payload."""
    return prod(tensor[2]) * BYTES[tensor[1]]


def write_shard(path: Path, shard: list[Tensor]) -> int:
    """A header in the order of safetensors' own writer (wide dtypes first, then by name) and a hole. Returns bytes."""
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in sorted(shard, key=lambda tensor: (-BYTES[tensor[1]], tensor[0])):
        start, end = end, end + nbytes((name, dtype, shape))
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return 8 + len(text)


# The peak is the process's own: getrusage would hand down the peak of the one that started it.
MEASURE = """
import json, sys, time
from transcoder import api, importing
from transcoder.formats.torch_dist_writer import metadata
begun = time.perf_counter()
plan = api.plan_hf2mcore(sys.argv[1], **json.loads(sys.argv[2]))
planned = time.perf_counter()
size = len(metadata(plan.placement))
ended = time.perf_counter()
peak = next(int(line.split()[1]) << 10 for line in open("/proc/self/status") if line.startswith("VmHWM"))
chunks = sum(len(spec.chunks) for spec in plan.placement.catalog.values())
found = {"plan": planned - begun, "metadata": ended - planned, "size": size, "chunks": chunks, "peak": peak}
print(json.dumps(found | {"tensors": len(plan.model.hf)}))
"""


def measure(folder: Path, grid: Mapping[str, int]) -> dict[str, Any]:
    """Plan, proof and `.metadata` of a fresh process: seconds, chunks, bytes of `.metadata`, peak resident bytes."""
    command = [sys.executable, "-c", MEASURE, str(folder), json.dumps(dict(grid))]
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(command, check=True, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    found: dict[str, Any] = json.loads(done.stdout)
    return found
