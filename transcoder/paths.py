"""Where files may be read, and the destination: refused early, built beside its place, made visible by renames.

Input is read through `open_regular` alone: regular files of the given folder, or of the hub cache that it belongs to.
"""

from __future__ import annotations

import mmap
import os
import re
import shutil
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from transcoder.errors import OutputError, Problem, UsageError, reason, refuse

SHARED_STORE = ".huggingface-shared-blobs"  # the file that marks the blob store of all repositories of a hub cache
LEADS_OUT = "a link that leads outside the model's directory"
_DIGEST = re.compile(r"[0-9a-f]{64}")


def open_regular(path: Path, follow_links: bool = False, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting. Raises OSError, ValueError for a link that leads out, a pipe.

    follow_links: permit a link to any place; for weight files only, when the user said so.
    root: the folder that links must not leave, by default the file's own.
    """
    try:
        real = path.resolve(strict=True)
    except RuntimeError as error:  # of Python before 3.13
        raise ValueError("a link that leads to itself") from error
    if not follow_links and not stays_inside(path, real, root):
        hint = "; --follow-links permits it" if path.suffix == ".safetensors" else ""
        raise ValueError(f"{LEADS_OUT}{hint}")
    if not stat.S_ISREG(real.stat().st_mode):
        raise ValueError("not a regular file")
    file = os.fdopen(os.open(real, os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW), "rb", buffering=0)
    if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):  # exchanged since
        file.close()
        raise ValueError("not a regular file")
    return file


def stays_inside(path: Path, real: Path, root: Path | None = None) -> bool:
    """Whether `path`, which is `real`, lies inside `root` or in the blob stores of the hub cache that it belongs to.

    `root/x` → `../../blobs/ETAG` where root is a snapshot, and from there, or at once, to an entry of the store that
    all repositories share: `<cache>/blobs/<2 digits>/<64 digits>`, as in huggingface_hub 2.
    """
    folder = (root or path.parent).resolve()
    if real.is_relative_to(folder):
        return True
    if folder.parent.name != "snapshots":
        return False
    repository = folder.parent.parent
    store = repository.parent / "blobs"
    shared = real == store / real.name[:2] / real.name and _DIGEST.fullmatch(real.name) is not None
    return real.parent == repository / "blobs" or (shared and (store / SHARED_STORE).is_file())


def read_small(path: Path, limit: int, root: Path | None = None) -> bytes:
    """A regular file of at most `limit` bytes. Raises OSError, ValueError."""
    with open_regular(path, root=root) as file:
        size = os.fstat(file.fileno()).st_size
        if size > limit:
            raise ValueError(f"{size} bytes, the limit is {limit}")
        data = bytearray()
        while len(data) < size and (piece := file.read(size - len(data))):
            data += piece
    return bytes(data)


def map_file(path: Path, follow_links: bool = False, root: Path | None = None) -> memoryview:
    """A file's bytes, mapped read-only; an empty file gives an empty view. Raises InputError."""
    try:
        with open_regular(path, follow_links, root) as file:
            size = os.fstat(file.fileno()).st_size
            return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ)) if size else memoryview(b"")
    except (OSError, ValueError) as error:
        raise refuse(
            "file", "a file of the checkpoint cannot be read", [Problem(file=path.name, message=reason(error))]
        ) from error


def plain_name(value: object) -> bool:
    """One path component, nothing that any system could read as more."""
    plain = isinstance(value, str) and 0 < len(value) < 256 and value not in (".", "..")
    return plain and not set(str(value)) & set("/\\\0:")


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
