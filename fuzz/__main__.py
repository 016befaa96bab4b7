"""Fuzz every target, or those that are named, for N seconds each; the exit status is 1 when anything is found."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

from fuzz.targets import TARGETS

SHM = Path("/dev/shm")


def main() -> int:
    """Run the targets one after another and print a line for each."""
    parser = argparse.ArgumentParser(prog="fuzz", description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--folder", type=Path, default=Path("build/fuzz"), help="for inputs that are learned or found")
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print(f"{'target':<12} {'executions':>11} {'edges':>6} {'inputs':>6} {'parsed':>9} {'refused':>9} {'findings':>8}")
    found = [_fuzz(name, options.seconds, options.folder) for name in options.targets or TARGETS]
    return 1 if any(found) else 0


def _fuzz(name: str, seconds: int, folder: Path) -> bool:
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as place:
        command = [sys.executable, "-m", "fuzz.guided", name, str(seconds), str(folder)]
        environment = {**os.environ, "TMPDIR": place}
        run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False)
    log = run.stdout.decode(errors="replace")
    (folder / f"{name}.log").write_text(log)
    findings = re.findall(r"^FINDING .*", log, re.M)
    if run.returncode:
        findings.append(f"the fuzzer ended with status {run.returncode}: {folder / name}.log")
    units, edges = _last(r"number_of_executed_units:\s*(\d+)", log), _last(r"cov: (\d+)", log)
    inputs = _last(r"corp: (\d+)", log)
    parsed, refused = _last(r"'parsed': (\d+)", log), _last(r"'refused': (\d+)", log)
    row = f"{name:<12} {units:>11,} {edges:>6,} {inputs:>6,} {parsed:>9,} {refused:>9,} {len(findings):>8,}"
    print(row, flush=True)
    print(*(f"    {line}\n" for line in findings), sep="", end="", flush=True)
    return bool(findings)


def _last(pattern: str, log: str) -> int:
    found = re.findall(pattern, log)
    return int(found[-1]) if found else 0


if __name__ == "__main__":
    sys.exit(main())
