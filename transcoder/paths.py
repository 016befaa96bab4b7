"""Whether a destination can be written to."""

from __future__ import annotations

from pathlib import Path

from transcoder.errors import OutputError, Problem, UsageError


def check_free(dst: Path, src: Path, overwrite: bool) -> Path:
    """Refuse a destination that cannot be written to; its work folder. Raises OutputError, UsageError."""
    one, two = dst.resolve(), src.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise UsageError(f"{dst} and {src} lie inside one another", kind="destination")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise refused(dst, "is not a directory", "choose another destination")
    if dst.exists() and any(dst.iterdir()) and not overwrite:
        raise refused(dst, "exists and is not empty", "choose another destination, or give --overwrite")
    return dst.parent / f"{dst.name}.partial"


def refused(path: Path, found: str, hint: str) -> OutputError:
    """The error for a destination that cannot be used."""
    problem = Problem(file=str(path), found=found, hint=hint)
    return OutputError("the destination cannot be used", kind="destination", problems=[problem])
