"""Runs `transcode` as a user does, in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"
COMMAND = Path(sys.executable).with_name("transcode")
PATIENCE = 60.0  # seconds for one command
Argument = str | os.PathLike[str] | int
Tree = dict[str, bytes | str]


@dataclass(frozen=True)
class Result:
    """What a command left: exit status, stdout, stderr."""

    code: int
    out: str
    err: str

    @property
    def report(self) -> dict[str, Any]:
        """The one JSON object on stdout, read strictly."""
        assert self.out.endswith("}\n"), f"stdout is not one JSON object: {self.out!r}, stderr: {self.err}"
        found = json.loads(self.out, parse_constant=_no_constant)
        assert isinstance(found, dict)
        return found


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is not JSON")


def transcode(*arguments: Argument, cwd: Path | None = None, driver: str = "", **environment: str) -> Result:
    """Run the installed command, or `driver`: Python source that changes the package before the command starts."""
    command = [*command_of(driver), *map(str, arguments)]
    done = subprocess.run(
        command, cwd=cwd, env=os.environ | environment, capture_output=True, text=True, timeout=PATIENCE
    )
    return Result(done.returncode, done.stdout, done.stderr)


def command_of(driver: str = "") -> list[str]:
    """The words that start the command."""
    if not driver:
        return [str(COMMAND)]
    return [sys.executable, "-c", f"{driver}\nfrom transcoder.cli import main\nmain()"]


def succeed(*arguments: Argument, cwd: Path | None = None, driver: str = "") -> Result:
    """Run the command, which must end well."""
    done = transcode(*arguments, cwd=cwd, driver=driver)
    assert done.code == 0, done.err
    return done


def tree(root: Path) -> Tree:
    """Every file below a folder with its bytes, every link with where it leads."""
    return {
        path.relative_to(root).as_posix(): f"-> {path.readlink()}" if path.is_symlink() else path.read_bytes()
        for path in sorted(root.rglob("*"))
        if path.is_symlink() or path.is_file()
    }


def names(folder: Path) -> list[str]:
    """The entries of a folder."""
    return sorted(entry.name for entry in folder.iterdir())


def flip(path: Path, place: int) -> None:
    """Change one bit of a file."""
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)
