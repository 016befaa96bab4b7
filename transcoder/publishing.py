"""Whether a destination can be written to, and how a finished work folder becomes it: by renames that can be repeated.

What is to appear is noted with its inode before anything moves: an entry that already has it is in its place.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from transcoder.disk import exchange, is_folder, sync_folder, there, walk
from transcoder.errors import OutputError, Problem, TranscoderError, UsageError
from transcoder.remote.paths import remote

OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)  # what renaming over another kind of entry says


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
    if not remote(src) and (one.is_relative_to(two) or two.is_relative_to(one)):
        raise UsageError(f"{dst} and {src} lie inside one another", kind="destination")
    if dst.is_symlink() or (dst.exists() and not dst.is_dir()):
        raise refused(dst, "is not a directory", "choose another destination")
    if dst.exists() and any(dst.iterdir()) and not overwrite:
        raise refused(dst, "exists and is not empty", "choose another destination, or give --overwrite")


def refused(path: Path, found: str, hint: str) -> OutputError:
    """The error for a destination that cannot be used."""
    problem = Problem(file=str(path), found=found, hint=hint)
    return OutputError("the destination cannot be used", kind="destination", problems=[problem])


def entries(out: Path, dst: Path, whole: bool) -> dict[str, int]:
    """What will appear, with inodes: the folder itself as `.`, or its entries, folders first and trackers last."""
    if whole or not there(dst) or not any(dst.iterdir()):
        return {".": out.stat().st_ino}
    made = sorted(out.iterdir(), key=lambda entry: (not is_folder(entry), entry.name))
    return {entry.name: entry.lstat().st_ino for entry in made}


def publish(out: Path, dst: Path, found: Mapping[str, int], stale: Iterable[str]) -> None:
    """Put `entries` of `out` into their places; drop the names in `stale` that were not made anew. Raises OSError."""
    if "." in found:
        _replace(out, dst, found["."])
        sync_folder(dst.parent)
        return
    for name, inode in found.items():
        _replace(out / name, dst / name, inode)
        sync_folder(dst)
    for name in set(stale) - found.keys():
        (dst / name).unlink(missing_ok=True)
    sync_folder(dst)


def _replace(new: Path, place: Path, inode: int) -> None:
    """Rename `new` to `place`; what cannot be renamed over changes places with it."""
    if there(place) and (not there(new) or place.lstat().st_ino == inode):
        return
    try:
        new.replace(place)  # POSIX: over a file, a link or an empty folder
    except OSError as error:
        if error.errno not in OCCUPIED:
            raise
        if not exchange(new, place):
            place.rename(new.with_name(f"{new.name}.replaced"))
            new.rename(place)


def keep_foreign(out: Path, dst: Path, stale: Iterable[str]) -> None:
    """Hard-link into `out` what `dst` holds beyond it, apart from the names in `stale`. Raises OSError."""
    gone = {dst / name for name in stale}
    for folder, names, files in walk(dst):
        place = out / Path(folder).relative_to(dst)
        for name in [*names, *files]:
            old, new = Path(folder) / name, place / name
            if old in gone or there(new):
                continue
            if is_folder(old):
                new.mkdir()
            else:
                os.link(old, new, follow_symlinks=False)
        names[:] = [name for name in names if is_folder(place / name)]
