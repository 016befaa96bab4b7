"""Whether a command did what the case demands: exit status, message, what it left, what it touched."""

# ruff: noqa: PTH115 (what lstat and readlink see)

from __future__ import annotations

import json
import os
import re
import stat
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from attacks.case import CHECKERS, Case
from attacks.model import SECRET
from attacks.sandbox import Ended

LONGEST_LINE = 400
HIDDEN_CONTROLS = frozenset(
    "\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\ufeff\u200b"
)
Snapshot = dict[str, tuple[Any, ...]]


def snapshot(root: Path) -> Snapshot:
    """Everything below a folder: kind, size, and the bytes of small files."""
    found: Snapshot = {}
    for place, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(place, name)
            if len(str(path)) > 3900:  # as long as the system takes
                continue
            row = path.lstat()
            small = stat.S_ISREG(row.st_mode) and row.st_size < 1 << 22 and os.access(path, os.R_OK)
            link = os.readlink(path) if stat.S_ISLNK(row.st_mode) else b""
            found[os.path.relpath(path, root)] = (
                row.st_mode,
                row.st_size if not stat.S_ISDIR(row.st_mode) else 0,
                link,
                path.read_bytes() if small else b"",
            )
    return found


def problems_of_text(text: str, what: str, longest: int | None = LONGEST_LINE) -> list[str]:
    """Raw control characters, characters that turn text around, lines that flood a terminal."""
    found = []
    bad = {
        char
        for char in text
        if (unicodedata.category(char) in ("Cc", "Cs") and char not in "\n\t") or char in HIDDEN_CONTROLS
    }
    if bad:
        found.append(f"{what} has raw {', '.join(sorted(f'U+{ord(char):04X}' for char in bad))}")
    long = [line for line in text.split("\n") if longest and len(line) > longest]
    if long:
        found.append(f"{what} has a line of {max(map(len, long))} characters")
    return found


def problems_of_error(text: str) -> list[str]:
    """An error is one paragraph that begins with `error:`, without a traceback."""
    found = ["a traceback"] if "Traceback" in text else []
    lines = text.rstrip("\n").split("\n")
    starts = [number for number, line in enumerate(lines) if line.startswith("error:")]
    if len(starts) != 1:
        return [*found, f"{len(starts)} lines begin with 'error:'"]
    if any(not line.strip() for line in lines[starts[0] :]):
        found.append("the error is not one paragraph")
    return found


def expected_codes(case: Case, command: str) -> tuple[int, ...]:
    """The exit statuses that the outcome allows."""
    refusals = (case.code, 5) if command.split()[0] in CHECKERS and case.code == 3 else (case.code,)
    return {"reject": refusals, "ok": (0,), "warn": (0, *refusals)}[case.outcome]


def problems_of_end(case: Case, command: str, ended: Ended) -> list[str]:
    """How the command ended, and what it said."""
    if ended.code is None:
        return [f"still running after {ended.seconds:.0f} s"]
    found = [f"did: {row}" for row in ended.seen[:5]]
    if ended.code not in expected_codes(case, command):
        found.append(f"exit {ended.code}")
    if ended.code == 0 and case.outcome == "warn" and "warning:" not in ended.err:
        found.append("no warning")
    if (case.outcome == "reject" or ended.code) and case.outcome != "ok" and ended.code in (2, 3, 4):
        found += problems_of_error(ended.err)
    said = ended.err + (ended.out if ended.code == 5 else "")
    if case.outcome != "ok" and case.needle and not re.search(case.needle, said, re.IGNORECASE | re.DOTALL):
        found.append(f"the message does not say /{case.needle}/")
    if SECRET.decode() in ended.err + ended.out:
        found.append("printed a file from outside")
    return found + flood(ended) + problems_of_text(ended.err, "stderr") + problems_of_text(ended.out, "stdout", None)


def problems_of_json(case: Case, command: str, ended: Ended) -> list[str]:
    """The one object of `--json`: the same exit status, and for a refusal a stable kind."""
    if ended.code is None:
        return []
    try:
        report = json.loads(ended.out, parse_constant=_no_constant)
    except ValueError as error:
        return [f"--json: {error}: {ended.out[:80]!r}"]
    found = [f"--json: exit {ended.code}"] if ended.code not in expected_codes(case, command) else []
    error = report.get("error") or {}
    if ended.code and error.get("code") != ended.code:
        found.append(f"--json: error.code {error.get('code')} beside exit {ended.code}")
    if ended.code and not re.fullmatch(r"[a-z][a-z0-9-]+", str(error.get("kind"))):
        found.append(f"--json: kind {error.get('kind')!r}")
    if ended.code == 0 and case.outcome == "warn" and not report.get("warnings"):
        found.append("--json: no warning")
    return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def problems_of_files(
    case: Case, ended: Ended, before: Mapping[str, Snapshot], after: Mapping[str, Snapshot]
) -> list[str]:
    """What the command changed where it must change nothing, and what it left after a refusal."""
    found = [f"changed {name}" for name in ("source", "outside") if before[name] != after[name]]
    if ended.code != 0 and after["out"] != before["out"]:
        left = sorted(set(after["out"]) - set(before["out"]))
        found.append(f"left {left[:4]}")
    if any(SECRET in row[3] for row in after["out"].values() if row not in before["out"].values()):
        found.append("copied a file from outside")
    if ended.peak > 1 << 30:
        found.append(f"peak memory {ended.peak >> 20} MiB")
    return found


def flood(ended: Ended) -> list[str]:
    """More lines than a person reads."""
    lines = ended.err.count("\n")
    return [f"{lines} lines on stderr"] if lines > 120 else []


def problems_of_result(place: Path, out: Path) -> list[str]:
    """Side files that must not have come along, and modes that files must have: `absent` and `modes` of the case."""
    rows = [(path, path.lstat()) for path in out.rglob("*")]
    absent = (place / "absent").read_text().splitlines() if (place / "absent").exists() else []
    found = [f"{path.name} came along" for path, _ in rows if path.name in absent]
    if (place / "modes").exists():
        odd = [
            path.name
            for path, row in rows
            if stat.S_ISREG(row.st_mode) and (stat.S_IMODE(row.st_mode) != 0o644 or row.st_nlink != 1)
        ]
        found += [f"not plain files of mode 0644: {odd[:5]}"] if odd else []
    return found
