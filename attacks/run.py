"""Runs attacks against the tool: `python attacks/run.py [NAME ...]`, a name being a part of a case's."""

from __future__ import annotations

import argparse
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ is None or __package__ == "":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    sys.path = [entry for entry in sys.path if Path(entry or ".").resolve() != Path(__file__).resolve().parent]

from attacks import bench, judge, model, sandbox
from attacks.case import Case, all_cases
from attacks.checkpoint import write_checkpoint

Row = dict[str, Any]


def command_line(words: Sequence[str]) -> int:
    """The tool's own entry point."""
    from transcoder.cli import main

    sys.argv = ["transcode", *words]
    main()
    return 0


def prepare(place: Path) -> dict[str, Path]:
    """The good folders: a model, a checkpoint made here, and one that the tool makes."""
    bases = {name: place / name for name in ("hf", "mcore", "made", "zarr", "zarr3")}
    model.write_model(bases["hf"])
    write_checkpoint(bases["mcore"] / "iter_0000000")
    bounds = sandbox.Bounds((str(place),), (str(place),))
    words = ["hf2mcore", str(bases["hf"]), str(bases["made"]), "--tp", "2", "--no-sync"]
    ended = sandbox.run(lambda: command_line(words), place / "log", bounds)
    assert ended.code == 0 and not ended.seen, ended
    here = Path(__file__).resolve().parent.parent
    for form in ("zarr", "zarr3"):  # written by another process, since tensorstore starts threads; read without it
        words = ["hf2mcore", str(bases["hf"]), str(bases[form]), "--tp", "2", "--no-sync", "--format", form]
        subprocess.run([sys.executable, "-m", "transcoder", *words], check=True, capture_output=True, cwd=here)
    return bases


def warm() -> None:
    """Import what the tool imports, so that an attack has no import of its own to hide behind."""
    import importlib

    import isal.isal_zlib
    import numpy
    import xxhash
    import yaml

    import transcoder.cli

    assert isal.isal_zlib and numpy and xxhash and yaml
    root = Path(transcoder.cli.__file__).parent
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).with_suffix("").parts
        if parts[0] not in ("runtime", "__main__", "generate", "compare", "__init__"):
            importlib.import_module(".".join(("transcoder", *(part for part in parts if part != "__init__"))))


def run_case(case: Case, bases: dict[str, Path], place: Path) -> Iterator[Row]:
    """One row for every command of a case."""
    place = Path(os.path.realpath(place))
    spoilt = bench.open_bench(place, bases[case.base])
    os.environ[sandbox.CANARY] = str(place / "canary")
    case.build(spoilt)
    before = snapshots(spoilt)
    for number, command in enumerate(case.commands):
        yield run_command(case, command, spoilt, bases, number, before)


def clear(out: Path, before: judge.Snapshot) -> None:
    """Take away what a command left."""
    for left in list(out.iterdir()):
        if left.name not in before:
            shutil.rmtree(left) if left.is_dir() and not left.is_symlink() else left.unlink()


def run_command(
    case: Case,
    command: str,
    spoilt: bench.Bench,
    bases: dict[str, Path],
    number: int,
    before: dict[str, judge.Snapshot],
) -> Row:
    """Run one command and judge it; the first of a refusal, and once more the first of a warning, with --json."""
    names = {
        "src": spoilt.source,
        "dst": spoilt.out / "dst",
        "good": bases["hf"],
        "place": spoilt.place,
        "folder": spoilt.folder,
    }
    words = [word.format(**names) for word in command.split()]
    as_json = number == 0 and case.outcome == "reject" and "--json" not in words
    ended = execute([*words, "--json"] if as_json else words, spoilt, bases)
    after = snapshots(spoilt)
    found = judge.problems_of_end(case, command, ended) + judge.problems_of_files(case, ended, before, after)
    if ended.code == 0 and case.outcome != "reject":
        found += judge.problems_of_result(spoilt.place, spoilt.out) + check_result(words, spoilt, bases)
    clear(spoilt.out, before["out"])
    if as_json:
        found += judge.problems_of_json(case, command, ended)
    elif number == 0 and case.outcome == "warn" and ended.code is not None:
        again = execute([*words, "--json"], spoilt, bases)
        clear(spoilt.out, before["out"])
        found += judge.problems_of_json(case, command, again)
    if (spoilt.place / "canary").exists():
        found.append("THE CANARY SANG: code of the input was executed")
    return {
        "case": case.name,
        "command": words[0],
        "wanted": case.outcome,
        "code": ended.code,
        "seconds": ended.seconds,
        "peak": ended.peak,
        "problems": found,
        "err": ended.err,
        "out": ended.out[-2000:],
    }


def execute(words: list[str], spoilt: bench.Bench, bases: dict[str, Path]) -> sandbox.Ended:
    """One run of the tool in the sandbox."""
    readable = (str(spoilt.source), str(spoilt.place / "hub"), str(bases["hf"]))
    follow = (str(spoilt.outside / "model"),) if "--follow-links" in words else ()
    bounds = sandbox.Bounds((*readable, *follow), (str(spoilt.out),))
    return sandbox.run(lambda: command_line(words), spoilt.place / "log", bounds)


def snapshots(spoilt: bench.Bench) -> dict[str, judge.Snapshot]:
    """What lies where a command works, and where it has no business."""
    return {name: judge.snapshot(spoilt.place / name) for name in ("source", "outside", "out")}


def check_result(words: list[str], spoilt: bench.Bench, bases: dict[str, Path]) -> list[str]:
    """After an accepted conversion: every weight is there, bit for bit, after the way back too."""
    made = spoilt.out / "dst"
    if words[0] == "hf2mcore":
        back = spoilt.out / "back"
        ended = execute(["mcore2hf", str(made), str(back), "--no-sync"], spoilt, bases)
        if ended.code:
            return [f"the way back: exit {ended.code}: {ended.err[:200]}"]
        return [] if weights(back) == weights(Path(words[1])) else ["other weights after the way back"]
    return [] if words[0] != "mcore2hf" or weights(made) == weights(bases["hf"]) else ["other weights"]


def weights(folder: Path) -> model.Tensors:
    """The tensors of a folder, its own kind of table left aside."""
    return model.read_tensors(folder)


def chosen(names: Sequence[str]) -> list[Case]:
    """The cases that the names mean."""
    cases = all_cases()
    found = [case for name, case in cases.items() if not names or any(part in name for part in names)]
    if not found:
        modules = sorted({case.module for case in cases.values()})
        sys.exit(f"no attack is called {', '.join(names)}; the modules are {', '.join(modules)}")
    return found


def run_all(cases: Sequence[Case], jobs: int) -> Iterator[Row]:
    """The rows of all cases, from `jobs` processes."""
    warm()
    gc.collect()
    gc.freeze()  # what is shared with the children is not touched by them
    with tempfile.TemporaryDirectory(prefix="attacks-") as text:
        root = Path(os.path.realpath(text))
        bases = prepare(root / "good")
        pipes = [_start(cases[number::jobs], bases, root / f"job{number}") for number in range(jobs)]
        for child, pipe in pipes:
            with os.fdopen(pipe) as lines:
                yield from map(json.loads, lines)
            assert os.waitpid(child, 0)[1] == 0, "a process of the runner ended badly"


def _start(cases: Sequence[Case], bases: dict[str, Path], root: Path) -> tuple[int, int]:
    """A process that runs its part of the cases; its rows come from the pipe."""
    reader, writer = os.pipe()
    child = os.fork()
    if child:
        os.close(writer)
        return child, reader
    status = 1
    try:
        _serve(cases, bases, root, writer)
        status = 0
    finally:
        sys.stderr.flush()
        os._exit(status)


def _serve(cases: Sequence[Case], bases: dict[str, Path], root: Path, writer: int) -> None:
    try:
        with os.fdopen(writer, "w") as lines:
            for case in cases:
                place = root / case.name
                place.mkdir(parents=True)
                for row in run_case(case, bases, place):
                    lines.write(json.dumps(row) + "\n")
                shutil.rmtree(place, ignore_errors=True)
    except BaseException:
        import traceback

        traceback.print_exc()
        raise


def show(rows: Iterable[Row], verbose: bool) -> int:
    """Print the table; the number of cases that went wrong."""
    bad, seen = set(), set()
    for row in rows:
        seen.add(row["case"])
        mark = "BAD" if row["problems"] else "ok "
        code = "time" if row["code"] is None else row["code"]
        costs = f"{row['seconds']:5.2f} s {row['peak'] >> 20:5} MiB"
        print(f"{mark} {row['case']:52} {row['command']:9} {row['wanted']:6} exit {code!s:4} {costs}")
        if row["problems"]:
            bad.add(row["case"])
        for line in row["problems"]:
            print(f"      {line}")
        if verbose or row["problems"]:
            print("      | " + row["err"].strip().encode("ascii", "backslashreplace").decode()[:600])
    print(f"{len(seen)} attacks, {len(bad)} not as required")
    return len(bad)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object a line")
    parser.add_argument("--list", action="store_true", help="name the attacks and run none")
    parser.add_argument("--verbose", action="store_true", help="print every message")
    options = parser.parse_args()
    cases = chosen(options.names)
    if options.list:
        print("\n".join(f"{case.name:52} {case.outcome:6} {case.summary}" for case in cases))
        return 0
    rows = run_all(cases, options.jobs)
    if not options.json:
        return bool(show(rows, options.verbose))
    for row in rows:
        print(json.dumps(row))
    return 0


if __name__ == "__main__":
    sys.exit(main())
