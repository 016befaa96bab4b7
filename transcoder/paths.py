"""The destination: refused early, built beside its place, made visible by renames once it is complete."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from transcoder.errors import OutputError, Problem, UsageError


@contextmanager
def destination(dst: Path, src: Path, overwrite: bool, stale: Iterable[str] = ()) -> Iterator[Path]:
    """A work folder `DST.partial` that becomes `dst` by one rename; a failed run leaves neither behind.

    With `overwrite` the entries that were made replace those of an existing `dst`, one by one, and the names in
    `stale` go; everything else in it stays. Raises OutputError when `dst` is not empty (and not `overwrite`) or a
    leftover work folder exists, UsageError when one of `dst` and `src` lies inside the other.
    """
    check_free(dst, src, overwrite)
    partial = dst.parent / f"{dst.name}.partial"
    if partial.exists():
        raise _refused(partial, "is left from another run", "remove it if no run is using it")
    try:
        _make(partial)
        yield partial
        _publish(partial, dst, stale)
    except OutputError:
        raise
    except OSError as error:
        raise _refused(dst, str(error), "free some space or choose another disk") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _make(partial: Path) -> None:
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _refused(partial, str(error), "choose a directory that can be written") from error


def check_free(dst: Path, src: Path, overwrite: bool) -> None:
    """Refuse a destination that cannot be written to. Raises OutputError, UsageError."""
    one, two = dst.resolve(), src.resolve()
    if one.is_relative_to(two) or two.is_relative_to(one):
        raise UsageError(f"{dst} and {src} lie inside one another", kind="destination")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise _refused(dst, "is not a directory", "choose another destination")
    if dst.exists() and any(dst.iterdir()) and not overwrite:
        raise _refused(dst, "exists and is not empty", "choose another destination, or give --overwrite")


def _refused(path: Path, found: str, hint: str) -> OutputError:
    problem = Problem(file=str(path), found=found, hint=hint)
    return OutputError("the destination cannot be used", kind="destination", problems=[problem])


def _publish(partial: Path, dst: Path, stale: Iterable[str]) -> None:
    sync_folders(partial)
    if dst.exists() and any(dst.iterdir()):
        _replace_entries(partial, dst, stale)
    else:
        partial.rename(dst)  # POSIX rename replaces an empty directory
    sync_folder(dst.parent)


def _replace_entries(partial: Path, dst: Path, stale: Iterable[str]) -> None:
    """Folders first, files (trackers, the index) last: until then readers see the old state."""
    made = sorted(partial.iterdir(), key=lambda entry: (not entry.is_dir() or entry.is_symlink(), entry.name))
    for entry in made:
        place = dst / entry.name
        if place.is_symlink():
            place.unlink()
        elif place.is_dir():
            place.rename(partial / f".replaced-{entry.name}")
        entry.replace(place)
    for name in set(stale) - {entry.name for entry in made}:
        (dst / name).unlink(missing_ok=True)
    sync_folder(dst)


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
