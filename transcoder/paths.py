"""Where files may be read: regular files of the given folder, or of the hub cache that it belongs to.

Input is read through `open_regular` alone.
"""

from __future__ import annotations

import mmap
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from transcoder.errors import Problem, reason, refuse
from transcoder.remote.files import RemoteFile
from transcoder.remote.paths import remote

SHARED_STORE = ".huggingface-shared-blobs"  # the file that marks the blob store of all repositories of a hub cache
WHOLE = 1 << 30  # bytes of an object that is fetched as one
LEADS_OUT = "a link that leads outside the model's directory"
_DIGEST = re.compile(r"[0-9a-f]{64}")


class Extent(Protocol):
    """The bytes of a file: a mapped one, or an object of a store, whose slices are fetched."""

    def __len__(self) -> int: ...

    def __getitem__(self, place: slice, /) -> memoryview: ...


def open_regular(path: Path, follow_links: bool = False, root: Path | None = None) -> BinaryIO:
    """Open a regular file for reading, without waiting. Raises OSError, ValueError for a link that leads out, a pipe.

    follow_links: permit a link to any place; for weight files only, when the user said so.
    root: the folder that links must not leave, by default the file's own.
    """
    if there := remote(path):
        return cast(BinaryIO, there.reader())
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
        size = length(file)
        if size > limit:
            raise ValueError(f"{size} bytes, the limit is {limit}")
        data = bytes(file.read(size))
        while len(data) < size and (piece := file.read(size - len(data))):
            data += piece
        if len(data) < size:
            raise ValueError(f"it ends after {len(data)} of {size} bytes")
    return data


def length(file: BinaryIO) -> int:
    """Bytes of an open file."""
    return int(file.size) if hasattr(file, "size") else os.fstat(file.fileno()).st_size


def extent(path: Path, follow_links: bool = False, root: Path | None = None) -> Extent:
    """A file's bytes, to be read range by range. Raises InputError."""
    there = remote(path)
    return there.open() if there else map_file(path, follow_links, root)


def passing(view: Extent, start: int, stop: int, step: int) -> Iterator[memoryview]:
    """The bytes [start, stop) in pieces, of `step` bytes where they lie in memory."""
    if isinstance(view, RemoteFile):
        return view.passing(start, stop)
    return (view[first : min(first + step, stop)] for first in range(start, stop, step))


def map_file(path: Path, follow_links: bool = False, root: Path | None = None) -> memoryview:
    """A file's bytes, mapped read-only, an object's fetched; an empty file gives an empty view. Raises InputError."""
    if there := remote(path):
        if len(whole := there.open()) > WHOLE:
            problem = Problem(file=str(path), expected=f"at most {WHOLE} bytes", found=str(len(whole)))
            raise refuse("file", "this file is too large to be held in memory: copy it to a disk", [problem])
        return whole[:]
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
