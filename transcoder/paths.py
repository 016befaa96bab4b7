"""The destination: refused early, built beside its place, made visible by one rename."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transcoder.errors import OutputError, Problem, UsageError


@contextmanager
def destination(dst: Path, src: Path, overwrite: bool) -> Iterator[Path]:
    """A work folder `DST.partial` that becomes `dst` by one rename; a failed run leaves neither behind.

    Raises OutputError when `dst` is not empty (and not `overwrite`) or a leftover work folder exists, and
    UsageError when one of `dst` and `src` lies inside the other.
    """
    _check_apart(dst, src)
    partial = dst.parent / f"{dst.name}.partial"
    if dst.is_symlink() or (dst.exists() and (not dst.is_dir() or any(dst.iterdir())) and not overwrite):
        raise _refused(dst, "exists and is not empty", "choose another destination, or give --overwrite")
    try:
        partial.mkdir(parents=True)
    except FileExistsError as error:
        raise _refused(partial, "is left from another run", "remove it if no run is using it") from error
    except OSError as error:
        raise _refused(partial, str(error), "") from error
    try:
        yield partial
        _publish(partial, dst)
    except OSError as error:
        raise (
            error
            if isinstance(error, OutputError)
            else _refused(dst, str(error), "free some space or choose another disk")
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _refused(path: Path, found: str, hint: str) -> OutputError:
    return OutputError(
        f"{path} {found}", kind="destination", problems=[Problem(file=str(path), found=found, hint=hint)]
    )


def _check_apart(dst: Path, src: Path) -> None:
    one, two = dst.resolve(), src.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise UsageError(f"{dst} and {src} lie inside one another", kind="destination")


def _publish(partial: Path, dst: Path) -> None:
    sync_folders(partial)
    if dst.exists():
        old = dst.parent / f"{dst.name}.old"
        dst.rename(old)
        partial.rename(dst)
        shutil.rmtree(old)
    else:
        partial.rename(dst)
    sync_folder(dst.parent)


def sync_folders(root: Path) -> None:
    """Make the entries of a folder and of all folders below it durable."""
    for folder, _, _ in os.walk(root):
        sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Make the entries of one folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, data: bytes, sync: bool = True) -> None:
    """A new regular file, durable if `sync`. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("xb") as file:
        file.write(data)
        file.flush()
        if sync:
            os.fsync(file.fileno())
