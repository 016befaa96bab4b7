"""Runs the converters that can be installed beside ours, each as a fresh process tree: wall, CPU, memory.

The peers live in a virtual environment of their own, which the script makes (about 4 GB). Rounds are interleaved:
cp, ours, every peer, and again, on a tiny source, one of 2.5 GB and one of 5.6 GB, so that the cost of a further GB is
known. A peer that does not install or run is named with the reason. Results: peers.jsonl, peers.png, peers.svg.

    python benchmarks/compare_peers.py --venv build/peers
    python benchmarks/compare_peers.py --venv build/peers --sources tiny --rounds 1
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convert import folder_bytes, recycle, warm
from drawing_peers import draw
from machine import ROOT, demand_room, describe
from process_tree import Watch
from ratios import Result, line, markdown
from rounds import say
from rows import PEERS
from sources import add_tokenizer, make, source_bytes

# In this order: torch first and by itself, or the resolver takes a CUDA build; then what needs older versions.
PACKAGES = (
    (["torch==2.13.0"], "torch"),
    (["safetensors", "numpy<2.5", "packaging"], "safetensors"),
    (
        ["transformers<5", "huggingface_hub<1", "accelerate", "einops", "sentencepiece", "tiktoken", "regex"],
        "transformers",
    ),
    (["--no-deps", "megatron-core==0.16.1", "triton"], "megatron-core"),
    (["--no-deps", "mbridge==0.15.1"], "mbridge"),
    (["--no-deps", "megatron-bridge==0.3.1"], "megatron-bridge"),
    (
        [
            "omegaconf",
            "hydra-core==1.3.2",
            "rich",
            "tqdm",
            "six",
            "tensorboard",
            "wandb",
            "nvidia-modelopt",
            "datasets<4",
            "huggingface_hub<1",
        ],
        "its needs",
    ),
)
ALONE = (["mergekit==0.1.5"], "mergekit")  # wants other versions than all others: an environment of its own
CONVERTERS = {"mbridge-import": 20.0, "bridge-import": 20.0, "bridge-export": 20.0}  # demanded: times faster, warm
DURABLE, CPU = 5.0, 10.0  # demanded: times faster with sync, and times fewer CPU seconds for a further GB
KINDS = ("load-save", "dcp-save", "mergekit", *CONVERTERS)
OURS = {"mbridge-import": "ours-import", "bridge-import": "ours-import", "bridge-export": "ours-export"}


@dataclass(frozen=True)
class Run:
    """One command: seconds until it ended and until `sync` returned, CPU seconds, peak bytes of the process tree."""

    wall: float
    durable: float
    cpu: float
    pss: int
    anonymous: int


def install(venv: Path) -> dict[str, str]:
    """Makes the environments unless they are there; what could not be installed, with the reason."""
    failed = {}
    for folder, steps in ((venv, PACKAGES), (venv / "mergekit", (ALONE,))):
        if not (folder / "bin" / "pip").exists():
            subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        for packages, name in steps:
            command = [str(folder / "bin" / "pip"), "install", "-q", *packages]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                failed[name] = last_words(done.stderr)
    return failed


def last_words(text: str) -> str:
    """The last line that says something, for the report."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and "WARNING" not in line]
    return re.sub(r"(/[^\s/:]+){2,}/", "", lines[-1])[:200] if lines else "no message"


def command(kind: str, venv: Path, out: Path, source: Path) -> list[str]:
    """Of one peer, or of cp, or ours."""
    target, python = str(out / kind), str(venv / "bin" / "python")
    transcode = [sys.executable, "-m", "transcoder"]
    if kind == "cp":
        return ["cp", "-r", str(source), target]
    if kind == "ours-import":
        return [*transcode, "hf2mcore", str(source), target, "--no-sync", "--quiet"]
    if kind == "ours-export":
        return [*transcode, "mcore2hf", str(out / "ours-import"), target, "--no-sync", "--quiet"]
    if kind == "mergekit":
        recipe = out / "recipe.yml"
        models = {"merge_method": "passthrough", "dtype": "bfloat16", "models": [{"model": str(source)}]}
        recipe.write_text(json.dumps(models))
        return [str(venv / "mergekit" / "bin" / "mergekit-yaml"), str(recipe), target]
    given = f"{out / 'bridge-import'}:{source}" if kind == "bridge-export" else str(source)
    return [python, str(ROOT / "benchmarks" / "peers.py"), kind, given, target]


def run(kind: str, venv: Path, out: Path, source: Path) -> Run | str:
    """Runs one; what it said last where it failed."""
    asked = command(kind, venv, out, source)
    if not shutil.which(asked[0]):
        return f"{Path(asked[0]).name} is not installed"
    shutil.rmtree(out / kind, ignore_errors=True)
    os.sync()
    recycle(out, folder_bytes(source))
    begun = time.perf_counter()
    errors = out / "errors"
    with errors.open("wb") as said:
        process = subprocess.Popen(asked, stdout=said, stderr=said, env=environment())
        watch = Watch(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - begun
        process.returncode = os.waitstatus_to_exitcode(status)
        watch.stop()
    os.sync()
    durable = time.perf_counter() - begun
    if status:
        return last_words(errors.read_text(errors="replace"))
    return Run(wall, durable, usage.ru_utime + usage.ru_stime, watch.pss, watch.anonymous)


def environment() -> dict[str, str]:
    """One thread, nothing from the network."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "WANDB_MODE": "disabled"}
    return {**os.environ, **offline, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}


Found = dict[str, dict[str, list[Run]]]  # source: kind: runs


def rounds(options: argparse.Namespace, folder: Path, failed: dict[str, str]) -> tuple[Found, dict[str, int]]:
    """All sources, one after the other; a peer that fails is not asked again."""
    found: Found = {}
    sizes = {}
    for name in options.sources:
        source, out = make(name, folder / "sources", quick=False), folder / "out"
        add_tokenizer(source)
        warm(source)
        out.mkdir()
        found[name], sizes[name] = {}, folder_bytes(source)
        for number in range(options.rounds + 1):
            for kind in ("cp", "ours-import", "ours-export", *options.kinds):
                if kind not in failed:
                    keep(kind, run(kind, options.venv, out, source), found[name], failed, number)
                if kind not in ("ours-import", "bridge-import"):
                    shutil.rmtree(out / kind, ignore_errors=True)
        shutil.rmtree(out)
        shutil.rmtree(source)
    return found, sizes


def keep(kind: str, ran: Run | str, found: dict[str, list[Run]], failed: dict[str, str], number: int) -> None:
    """Notes a run of a counted round, or why there is none."""
    if isinstance(ran, str):
        failed[kind] = ran
        found.pop(kind, None)
        say(f"  {kind}: {ran}")
        return
    say(f"  round {number}: {kind} {ran.wall:.2f} s, CPU {ran.cpu:.2f} s, PSS {ran.pss / 2**20:.0f} MiB")
    if number:
        found.setdefault(kind, []).append(ran)


def results(found: Found, sizes: dict[str, int]) -> list[Result]:
    """How many times faster ours is, warm and durable, on each source; costs of a further GB; memory."""
    rows = []
    for source, kinds in found.items():
        for kind, runs in kinds.items():
            title = f"{kind}, {source}"
            mine = kinds[OURS.get(kind, "ours-import")]
            if kind in KINDS:
                big = kind in CONVERTERS and source != "tiny"
                warm_ratio = [other.wall / our.wall for other, our in zip(runs, mine, strict=True)]
                durable = [other.durable / our.durable for other, our in zip(runs, mine, strict=True)]
                target = CONVERTERS.get(kind) if big else None
                rows.append(Result(PEERS, f"{title}: wall", "x ours", warm_ratio, target, higher=True))
                rows.append(
                    Result(PEERS, f"{title}: with sync", "x ours", durable, DURABLE if big else None, higher=True)
                )
            rows.append(Result(PEERS, f"{title}: wall", "s", [run.wall for run in runs]))
            rows.append(Result(PEERS, f"{title}: CPU", "s", [run.cpu for run in runs]))
            rows.append(Result(PEERS, f"{title}: peak PSS", "MiB", [run.pss / 2**20 for run in runs]))
            rows.append(Result(PEERS, f"{title}: peak anonymous", "MiB", [run.anonymous / 2**20 for run in runs]))
    return [*rows, *further(found, sizes)]


def further(found: Found, sizes: dict[str, int]) -> list[Result]:
    """Slopes over the sources that are not tiny, by medians; CPU against ours."""
    large = [source for source in found if source != "tiny"]
    if len(large) < 2:
        return []
    kinds = [kind for kind in found[large[0]] if all(kind in found[source] for source in large)]
    rows, slopes = [], dict[str, float]()
    for kind in kinds:
        for field, scale, unit in (("wall", 1.0, "s/GB"), ("cpu", 1.0, "CPU s/GB"), ("pss", 2.0**20, "MiB/GB")):
            medians = {name: statistics.median(getattr(run, field) for run in found[name][kind]) for name in large}
            slope = line([(sizes[name] / 1e9, medians[name] / scale) for name in large])[0]
            slopes[f"{kind} {field}"] = slope
            rows.append(Result(PEERS, f"{kind}, a further GB", unit, [slope]))
    for kind in kinds:
        if kind in CONVERTERS:
            ratio = slopes[f"{kind} cpu"] / slopes[f"{OURS[kind]} cpu"]
            rows.append(Result(PEERS, f"{kind}, a further GB", "x our CPU s", [ratio], CPU, higher=True))
    return rows


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--venv", type=Path, default=ROOT / "build" / "peers", help="made unless it is there")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument(
        "--sources", default="tiny,llama-1b,llama-5.6g", help="sources, with commas (default: %(default)s)"
    )
    parser.add_argument("--kinds", default=",".join(KINDS), help="peers, with commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=2, help="counted rounds, after one that is dropped")
    parser.add_argument("--installed", action="store_true", help="install nothing")
    options = parser.parse_args(arguments)
    options.sources, options.kinds = options.sources.split(","), options.kinds.split(",")
    if options.rounds < 1 or not set(options.kinds) <= set(KINDS):
        parser.error(f"--rounds at least 1, --kinds of {', '.join(KINDS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Installs, runs, prints, stores, draws."""
    options = parse(arguments)
    folder, before = options.folder.resolve() / "peers", os.getloadavg()
    options.venv = options.venv.resolve()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    largest = max(source_bytes(name, False) for name in options.sources)
    demand_room(folder, 5 * largest + (0 if options.installed else 6_000_000_000))
    failed = {} if options.installed else install(options.venv)
    lacking = dict(failed)
    found, sizes = rounds(options, folder, failed)
    shutil.rmtree(folder)
    rows = results(found, sizes)
    record = {
        "machine": describe(options.folder), "load": {"before": before, "after": os.getloadavg()}, "sizes": sizes,
        "failed": failed, "rows": [row.record() for row in rows],
    }  # fmt: skip
    store(options.folder, record)
    print(markdown(rows), *(f"- {name}: {why}" for name, why in (lacking | failed).items()), sep="\n")
    for path in draw(record["rows"], sizes, options.folder):
        say(str(path))


def store(folder: Path, record: dict[str, Any]) -> None:
    """One line for the run."""
    with (folder / "peers.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
