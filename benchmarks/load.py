"""Measures filling a live megatron-core model: seconds and memory, ours from each source beside megatron-core's own.

Every row is a fresh process, on one thread. Memory: the largest anonymous resident memory over that before loading,
when the parameters are allocated and not yet touched; so the parameters themselves count. Linux only.

    python benchmarks/load.py --workdir work/load --rounds 3
    python benchmarks/load.py --workdir work/load --layers 16 --hidden 2048 --ffn 8192
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
import threading
import time
from collections.abc import Callable
from hashlib import blake2b
from multiprocessing import get_context
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from synthetic import Shape, write_checkpoint  # noqa: E402

ANONYMOUS = re.compile(r"^RssAnon:\s+(\d+) kB", re.MULTILINE)
INTERVAL = 0.0005  # seconds
# name: the folder it reads, the type of the model, whose loader
WAYS = {
    "ours, checkpoint": ("mcore", "bfloat16", "ours"),
    "ours, Hugging Face": ("hf", "bfloat16", "ours"),
    "ours, checkpoint, cast": ("mcore", "float32", "ours"),
    "ours, Hugging Face, cast": ("hf", "float32", "ours"),
    "megatron-core": ("mcore", "bfloat16", "stock"),
}


class Peak:
    """The largest anonymous memory of this process while it is open."""

    def __init__(self) -> None:
        self.bytes, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._stop.wait(INTERVAL):
            self.bytes = max(self.bytes, anonymous())

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.bytes = max(self.bytes, anonymous())


def anonymous() -> int:
    """Anonymous resident bytes of this process."""
    found = ANONYMOUS.search(Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0


def stock(model: Any, folder: Path) -> None:
    """megatron-core's own loading."""
    from megatron.core import dist_checkpointing

    from transcoder.iterations import find_iteration

    place = str(find_iteration(folder))
    metadata = dict(dist_checkpointing.load_content_metadata(place) or {})
    loaded = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, place)
    model.load_state_dict(loaded["model"], strict=True)


def ours(model: Any, folder: Path) -> None:
    """This package's."""
    from transcoder.runtime.load import load

    load(model, folder)


def measure(way: str, workdir: Path) -> dict[str, Any]:
    """One row, measured in this process."""
    import torch

    from transcoder.runtime.model import build

    torch.set_num_threads(1)
    folder, dtype, whose = WAYS[way]
    model = build(workdir / "hf", dtype=dtype, device="cpu")
    loader: Callable[[Any, Path], None] = {"stock": stock, "ours": ours}[whose]
    before, started = anonymous(), time.monotonic()
    with Peak() as peak:
        loader(model, workdir / folder)
        seconds = time.monotonic() - started
    return {
        "way": way, "dtype": dtype, "seconds": seconds, "anonymous": peak.bytes - before,
        "parameter_bytes": sum(parameter.nbytes for parameter in model.parameters()), "digest": digest(model),
    }  # fmt: skip


def digest(model: Any) -> str:
    """Of every parameter's bytes, in order."""
    import torch

    found = blake2b(digest_size=16)
    for _, parameter in sorted(model.named_parameters()):
        found.update(parameter.detach().view(-1).view(torch.uint8).numpy())
    return found.hexdigest()


def apart(way: str, workdir: Path) -> dict[str, Any]:
    """One row, measured in a fresh process, which has the imports of this one."""
    from transcoder.runtime import load as _imported  # noqa: F401

    with get_context("fork").Pool(1) as pool:
        return pool.apply(measure, (way, workdir))


def prepare(options: argparse.Namespace) -> None:
    """Both sources, unless they are there."""
    import transcoder

    workdir = options.workdir
    if not (workdir / "hf").exists():
        workdir.mkdir(parents=True, exist_ok=True)
        heads = options.hidden // 64
        shape = Shape(options.layers, options.hidden, options.ffn, heads, max(1, heads // 4), 64, options.vocabulary)
        write_checkpoint(workdir / "hf", shape, 5_000_000_000)
    if not (workdir / "mcore").exists():
        transcoder.hf2mcore(workdir / "hf", workdir / "mcore", sync=False)


def row(way: str, found: list[dict[str, Any]]) -> str:
    """A line of the table."""
    seconds = statistics.median(each["seconds"] for each in found)
    peak, size = max(each["anonymous"] for each in found), found[0]["parameter_bytes"]
    extra = (peak - size) / (1 << 20)
    return f"{way:26} {size / 1e6:10.0f} {seconds:8.2f} {size / 1e9 / seconds:8.2f} {peak / size:8.2f} {extra:10.1f}"


def parse() -> argparse.Namespace:
    """The options; the defaults make 100 million parameters."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    for name, value in (("layers", 6), ("hidden", 1024), ("ffn", 4096), ("vocabulary", 16_000)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--json", action="store_true", help="one object a line instead of the table")
    return parser.parse_args()


def main() -> None:
    """Measure every way in every round, interleaved; print the table."""
    options = parse()
    prepare(options)
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for _ in range(options.rounds):
        for way in WAYS:
            found[way].append(apart(way, options.workdir))
    if options.json:
        print("\n".join(json.dumps(each) for rows in found.values() for each in rows))
        return
    print(f"{'':26} {'parameters':>10} {'':>8} {'':>8} {'peak /':>8} {'beside':>10}")
    print(f"{'':26} {'MB':>10} {'seconds':>8} {'GB/s':>8} {'params':>8} {'them, MiB':>10}")
    print("\n".join(row(way, rows) for way, rows in found.items()))


if __name__ == "__main__":
    main()
