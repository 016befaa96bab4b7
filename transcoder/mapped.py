"""Reading mapped files safely: a page that cannot be read is an error with a name, not the end of the process."""

from __future__ import annotations

import errno
import mmap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from transcoder.errors import InputError, Problem, TranscoderError, reason
from transcoder.formats.huggingface import SIDE_LIMIT
from transcoder.paths import Extent, read_small

PAGE = mmap.PAGESIZE
POPULATE_READ = 22  # MADV_POPULATE_READ of Linux 5.14: reads pages in, and fails where touching them would kill
UNKNOWN = (errno.EINVAL, errno.ENOSYS, errno.EPERM)  # what older kernels and sandboxes say of it


def ready(view: Extent, start: int, stop: int, file: str, tensor: str) -> memoryview:
    """The bytes [start, stop) of a mapped file, read in. Raises InputError when the disk or the file fails."""
    data = view[start:stop]
    if len(data) != stop - start:
        raise _lost(file, tensor, start, "the file ends before")
    if isinstance(mapped := getattr(view, "obj", None), mmap.mmap) and stop > start:
        first = start // PAGE * PAGE
        try:
            mapped.madvise(POPULATE_READ, first, stop - first)
        except OSError as error:
            if error.errno not in UNKNOWN:
                raise _lost(file, tensor, start, f"cannot be read: {error.strerror}") from error
    return data


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Errors of the system in the block, which reads a source, are refusals of it. Raises InputError."""
    try:
        yield
    except TranscoderError:
        raise
    except OSError as error:
        raise _lost(str(error.filename or path), "", 0, f"cannot be read: {error.strerror}") from error


def side_file(root: Path, name: str) -> bytes:
    """A side file of the model directory `root`. Raises InputError when it cannot be read."""
    try:
        return read_small(root / name, SIDE_LIMIT, root)
    except (OSError, ValueError) as error:
        raise _lost(name, "", 0, f"cannot be read: {reason(error)}") from error


def _lost(file: str, tensor: str, offset: int, found: str) -> InputError:
    hint = "see whether the disk is healthy and the file whole, then go on with --resume"
    problem = Problem(file=file, tensor=tensor, expected=f"bytes from {offset}", found=found, hint=hint)
    return InputError("the source cannot be read", kind="source-lost", problems=[problem])
