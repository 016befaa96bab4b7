"""Measures every row of the table of targets, prints it, stores it as a line of JSON and draws it.

make bench                                          # everything: about an hour, 25 GB of disk
make bench BENCH="--only dense,kernels --rounds 5"  # some groups
make bench BENCH=--quick                            # small sources: does it run, not how fast
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from fixed import run_kernels, run_plan, run_start
from growing import run_growth, run_memory
from machine import ROOT, demand_room, describe
from projection import figures, table
from ratios import Result, markdown
from rounds import Bench, run, say
from rows import FIXED, GROUPS, SIZES
from sources import source_bytes

RUNNERS: dict[str, Callable[[Bench], list[Result]]] = {
    "kernels": run_kernels,
    "plan": run_plan,
    "memory": run_memory,
    "start": run_start,
    "growth": run_growth,
}
MARGIN = 1.08


def room(groups: Sequence[str], quick: bool) -> int:
    """Bytes of disk that the groups need at most: the largest source and three of its size, or all that grow."""
    needs = [4 * source_bytes(variant.source, quick) for name in groups for variant in GROUPS.get(name, ())]
    grown = [source_bytes(name, quick) for name in SIZES]
    needs += [4 * max(grown)] if "memory" in groups else []
    needs += [sum(grown) + 2 * max(grown)] if "growth" in groups else []
    return int(MARGIN * max(needs, default=0)) + 500_000_000


def run_peers(folder: Path) -> list[Result]:
    """What compare_peers.py stored last: peers need gigabytes of packages, so measuring them is its own command."""
    stored = folder / "peers.jsonl"
    if not stored.exists():
        say("no peers: run benchmarks/compare_peers.py to measure them beside")
        return []
    last = json.loads(stored.read_text().splitlines()[-1])
    note = f"measured {last['machine']['date'][:10]} at {last['machine']['commit']}"
    known = Result.__dataclass_fields__
    return [
        Result(**{key: value for key, value in row.items() if key in known} | {"note": note}) for row in last["rows"]
    ]


def measured(bench: Bench, groups: Sequence[str]) -> Iterator[Result]:
    """The rows of the groups, one group after the other."""
    for name in groups:
        say(f"== {name}")
        if name in GROUPS:
            yield from run(bench, GROUPS[name])
        else:
            yield from run_peers(bench.folder) if name == "peers" else RUNNERS[name](bench)


def store(folder: Path, record: dict[str, Any]) -> None:
    """One line for the run."""
    with (folder / "results.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def report(record: dict[str, Any], results: list[Result]) -> str:
    """The table with the machine above, and the projection below."""
    machine, load = record["machine"], record["load"]
    given = ", ".join(f"{key} {value}" for key, value in machine.items())
    lines = [
        f"{given}",
        f"Load average {load['before'][0]:.2f} before, {load['after'][0]:.2f} after.",
        "",
        markdown(results),
    ]
    if record["quick"]:
        lines.insert(0, "QUICK: small sources; the ratios say nothing.\n")
    slow = sum(sum(result.slow) for result in results if result.name.endswith(": cp -r"))
    total = sum(len(result.slow) for result in results if result.name.endswith(": cp -r"))
    if total:
        lines.append(f"\nSlow mode of the machine (a copy beyond 1.8 x the median copy): {slow} of {total} rounds.")
    computed = figures(record["rows"])
    return "\n".join([*lines, *(["", table(computed)] if computed else [])])


def draw(folder: Path, record: dict[str, Any]) -> list[Path]:
    """PNG and SVG, where matplotlib is installed."""
    try:
        import drawing
    except ModuleNotFoundError:
        say("matplotlib is not installed: nothing drawn (pip install '.[bench]')")
        return []
    machine = record["machine"]
    title = f"{machine['cpu']}, {machine['cores']} cores, {machine['date'][:10]}, {machine['commit']}"
    rows = record["rows"]
    return [*drawing.draw_targets(rows, folder, title), *drawing.draw_scaling(rows, figures(rows), folder)]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Reads the command line."""
    every = [*GROUPS, *FIXED]
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(every), help="groups, with commas (default: %(default)s)")
    parser.add_argument("--rounds", type=int, help="counted rounds, after one that is dropped (default 5, quick 2)")
    parser.add_argument("--quick", action="store_true", help="small sources; shows that everything runs")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "bench")
    parser.add_argument("--transcode", help="the command to time (default: this Python's)")
    options = parser.parse_args(arguments)
    options.groups = [name for name in options.only.split(",") if name]
    unknown = [name for name in options.groups if name not in every]
    if unknown or not options.groups:
        parser.error(f"--only: no group named {', '.join(unknown)}; there are {', '.join(every)}")
    options.rounds = options.rounds if options.rounds is not None else (2 if options.quick else 5)
    if options.rounds < 1:
        parser.error("--rounds must be at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures, prints, stores, draws."""
    options = parse(arguments)
    folder = options.folder.resolve()
    bench = Bench(folder, options.rounds, options.quick)
    bench.transcode = shlex.split(options.transcode) if options.transcode else bench.transcode
    for path in (bench.out, bench.sources):
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    demand_room(folder, room(options.groups, options.quick))
    machine, before = describe(folder), os.getloadavg()
    results = list(measured(bench, options.groups))
    for path in (bench.out, bench.sources):
        shutil.rmtree(path, ignore_errors=True)
    record = {
        "machine": machine, "load": {"before": before, "after": os.getloadavg()}, "quick": options.quick,
        "groups": options.groups, "rounds": options.rounds, "rows": [result.record() for result in results],
    }  # fmt: skip
    store(folder, record)
    print(report(record, results))
    for path in draw(folder, record):
        say(str(path))


if __name__ == "__main__":
    main()
