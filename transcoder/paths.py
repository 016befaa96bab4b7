"""Whether a destination can be written to."""

from __future__ import annotations

from pathlib import Path

from transcoder.errors import OutputError, Problem, TranscoderError, UsageError


def check_free(dst: Path, src: Path, overwrite: bool) -> Path:
    """Refuse a destination that cannot be written to; its work folder. Raises OutputError, UsageError."""
    try:
        _check_free(dst, src, overwrite)
    except TranscoderError:
        raise
    except OSError as error:
        raise refused(dst, str(error), "choose a directory that can be written") from error
    return dst.parent / f"{dst.name}.partial"


def _check_free(dst: Path, src: Path, overwrite: bool) -> None:
    one, two = dst.resolve(), src.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise UsageError(f"{dst} and {src} lie inside one another", kind="destination")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise refused(dst, "is not a directory", "choose another destination")
    if dst.exists() and any(dst.iterdir()) and not overwrite:
        raise refused(dst, "exists and is not empty", "choose another destination, or give --overwrite")


def refused(path: Path, found: str, hint: str) -> OutputError:
    """The error for a destination that cannot be used."""
    problem = Problem(file=str(path), found=found, hint=hint)
    return OutputError("the destination cannot be used", kind="destination", problems=[problem])
