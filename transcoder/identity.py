"""What a run is: its command, options, source files and plan. Only the same run may go on where it stopped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import xxhash

from transcoder.errors import InputError, Problem, UsageError
from transcoder.places import places
from transcoder.remote.paths import remote

TOOL_VERSION = "0.1.0"
FACTS = ("bytes", "modified, in ns, or the ETag", "inode")  # of a source file or object


def identity(command: str, options: Mapping[str, Any], files: Iterable[Path], plan: Iterable[bytes]) -> dict[str, Any]:
    """The first record of a journal. plan: bytes that say what is decided. Raises InputError for a missing file."""
    digest = xxhash.xxh3_128()
    for part in plan:
        digest.update(part)
    return {
        "format": 1,
        "tool": TOOL_VERSION,
        "command": command,
        "options": {name: _plain(value) for name, value in sorted(options.items())},
        "source": {str(path.absolute()): _facts(path) for path in files},
        "plan": f"xxh3-128:{digest.hexdigest()}",
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, str | int | float) else str(value)


def _facts(path: Path) -> list[int | str]:
    if there := remote(path):
        return there.facts()
    try:
        facts = path.stat()
    except OSError as error:
        problem = Problem(file=str(path), found=str(error.strerror))
        raise InputError("a file of the source is gone", kind="source-changed", problems=[problem]) from error
    return [facts.st_size, facts.st_mtime_ns, facts.st_ino]


def check_unchanged(row: Mapping[str, Any], cause: Exception | None = None) -> None:
    """Whether the source files are those that the run began with. Raises InputError naming each that is not."""
    now = {name: _facts(path) for name, path in places(row["source"]).items()}
    if problems := _changed(row["source"], now):
        raise InputError("the source changed during the run", kind="source-changed", problems=problems) from cause


def check_same(old: Mapping[str, Any], new: Mapping[str, Any]) -> None:
    """Whether a journal is that of this run. Raises UsageError for another command, InputError for another source."""
    if asked := _differing(_asked(old), _asked(new)):
        raise UsageError("the unfinished run is another one", kind="resume", problems=asked)
    if problems := _changed(old["source"], new["source"]):
        message = "the source is not the one that the unfinished run read; start anew with --overwrite"
        raise InputError(message, kind="source-changed", problems=problems)
    if plan := _differing({"plan": old["plan"]}, {"plan": new["plan"]}):
        raise UsageError("the unfinished run is another one", kind="resume", problems=plan)


def _asked(row: Mapping[str, Any]) -> dict[str, Any]:
    """What people chose."""
    options = {f"option {name}": value for name, value in row["options"].items()}
    return {name: row[name] for name in ("format", "tool", "command")} | options


def _differing(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Problem]:
    hint = "give the same command and options with the same version, or start anew with --overwrite"
    names = [name for name in {**old, **new} if old.get(name) != new.get(name)]
    return [Problem(message=n, expected=str(old.get(n)), found=str(new.get(n)), hint=hint) for n in names]


def _changed(old: Mapping[str, list[int | str]], new: Mapping[str, list[int | str]]) -> list[Problem]:
    problems = []
    for path in sorted(old.keys() | new.keys()):
        before, after = old.get(path), new.get(path)
        if before is None or after is None:
            there, gone = "a file of the source", "none"
            problems.append(Problem(file=path, expected=there if before else gone, found=there if after else gone))
            continue
        found = [(fact, one, two) for fact, one, two in zip(FACTS, before, after, strict=True) if one != two]
        problems += [Problem(file=path, expected=f"{one} {fact}", found=str(two)) for fact, one, two in found]
    return problems
