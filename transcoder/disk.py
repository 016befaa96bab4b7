"""Every operation that changes the disk: files at their final size, ranges written, all of it made durable."""

from __future__ import annotations

import ctypes
import os
import stat
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path

from transcoder.remote.paths import remote
from transcoder.remote.uploads import Upload

PIECE = 1 << 20  # bytes of one write
START_WRITING = 2  # SYNC_FILE_RANGE_WRITE
AT_FDCWD, RENAME_EXCHANGE = -100, 2


File = int | Upload  # a descriptor, or an object of a store that is sent part by part


def sized(path: Path, size: int) -> File:
    """The descriptor of a regular file with room for `size` bytes, made where it is missing. Raises OSError."""
    if there := remote(path):
        return there.upload(size)
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
    try:
        if size:
            os.posix_fallocate(file, 0, size)
    except BaseException:
        os.close(file)
        raise
    return file


def opened(path: Path, size: int) -> File:
    """The descriptor of a file that `sized` made, to write more of it. Raises OSError."""
    if there := remote(path):
        return there.upload(size)
    return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)


def write_all(file: File, data: memoryview, offset: int) -> None:
    """Write every byte at `offset`, however often the kernel writes fewer."""
    if isinstance(file, Upload):
        file.write(data, offset)
        return
    while len(data):
        written = os.pwrite(file, data[:PIECE], offset)
        data, offset = data[written:], offset + written


def write_file(path: Path, data: bytes | memoryview, sync: bool = True) -> None:
    """A new regular file, durable if `sync`; folders above it are made. Raises OSError."""
    if there := remote(path):
        there.put(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        write_all(file, memoryview(data), 0)
        if sync:
            os.fsync(file)
    finally:
        os.close(file)


def make_durable(file: File) -> None:
    """Wait until what was written is on disk; parts of an object are where they belong once they are sent."""
    if isinstance(file, int):
        os.fdatasync(file)


def close(file: File) -> None:
    """Release a descriptor."""
    if isinstance(file, int):
        os.close(file)


def start_flush(file: File, offset: int, size: int) -> None:
    """Let the kernel begin to write a range to disk, where it can; errors show when the file is synced."""
    call = _libc("sync_file_range", ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)
    if call is not None and isinstance(file, int):
        call(file, offset, size, START_WRITING)


def exchange(one: Path, two: Path) -> bool:
    """Let two entries of a file system change places at once; False where the system cannot."""
    call = _libc("renameat2", ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if call is None:
        return False
    return call(AT_FDCWD, os.fsencode(one), AT_FDCWD, os.fsencode(two), RENAME_EXCHANGE) == 0


@lru_cache
def _libc(name: str, *types: type) -> Callable[..., int] | None:
    call = getattr(ctypes.CDLL(None), name, None)  # these two exist on Linux only
    if call is not None:
        call.argtypes = types
    return call


def there(path: Path) -> bool:
    """Whether something, be it a link to nothing, has this name. Raises OSError when that cannot be told."""
    try:
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    return True


def is_folder(path: Path) -> bool:
    """Whether a folder, not a link to one, has this name. Raises OSError when that cannot be told."""
    return there(path) and stat.S_ISDIR(path.lstat().st_mode)


def walk(root: Path, topdown: bool = True) -> Iterator[tuple[str, list[str], list[str]]]:
    """`os.walk` that leaves out nothing. Raises OSError for a folder that cannot be read."""
    return os.walk(root, topdown, _raised)


def _raised(error: OSError) -> None:
    raise error


def sync_folders(root: Path) -> None:
    """Make the entries of a folder and of all folders below it durable."""
    for folder, _, _ in walk(root):
        sync_folder(Path(folder))


def sync_folder(folder: Path) -> None:
    """Make the entries of one folder durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def forget_pages(root: Path) -> None:
    """Drop the cached pages of all files below a folder that are on disk, so that the disk is read next."""
    files = root.rglob("*") if isinstance(root, Path) else ()
    for path in (path for path in files if path.is_file() and not path.is_symlink()):
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
