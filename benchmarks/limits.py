"""What the machine allows: the bytes of a folder, read and written by a bare loop, and nothing else.

Page-aligned pieces of 1 MiB through `preadv` and `pwrite` into preallocated files; several processes write different
files. With --crc every piece also gets the CRC-32 that a conversion computes. Prints the seconds, without start-up:

    python benchmarks/limits.py work/llama-1b work/bare --processes 2 --crc
"""

from __future__ import annotations

import argparse
import mmap
import os
import time
from pathlib import Path

from isal.isal_zlib import crc32

PIECE = 1 << 20
Span = tuple[Path, int, int]  # file, first byte, bytes


def spans(folder: Path, parts: int) -> list[list[Span]]:
    """All bytes below a folder, cut into parts of about equal size at multiples of 1 MiB.

    >>> import tempfile
    >>> with tempfile.TemporaryDirectory() as place:
    ...     _ = Path(place, "file").write_bytes(bytes(3 << 20))
    ...     [[length for _, _, length in part] for part in spans(Path(place), 2)]
    [[1048576], [2097152]]
    """
    files = [(path, path.stat().st_size) for path in sorted(folder.rglob("*")) if path.is_file()]
    total, done = sum(length for _, length in files), 0
    found: list[list[Span]] = [[] for _ in range(parts)]
    for path, length in files:
        for first in range(0, length, PIECE):
            piece = min(PIECE, length - first)
            found[min(parts - 1, (done + piece) * parts // (total + 1))].append((path, first, piece))
            done += piece
    return [joined(part) for part in found]


def joined(pieces: list[Span]) -> list[Span]:
    """Neighbouring pieces as one."""
    found: list[Span] = []
    for path, first, length in pieces:
        if found and found[-1][0] == path and sum(found[-1][1:]) == first:
            found[-1] = (path, found[-1][1], found[-1][2] + length)
        else:
            found.append((path, first, length))
    return found


def move(part: list[Span], target: Path, crc: bool) -> None:
    """One process's share, into one file."""
    buffer = mmap.mmap(-1, PIECE)
    written, value = 0, 0
    out = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.posix_fallocate(out, 0, max(1, sum(length for _, _, length in part)))
    for path, first, length in part:
        source = os.open(path, os.O_RDONLY)
        for offset in range(first, first + length, PIECE):
            piece = memoryview(buffer)[: min(PIECE, first + length - offset)]
            if os.preadv(source, [piece], offset) != len(piece) or os.pwrite(out, piece, written) != len(piece):
                raise SystemExit(f"{path}: short read or write at {offset}")
            value = crc32(piece, value) if crc else 0
            written += len(piece)
        os.close(source)
    os.close(out)


def run(folder: Path, target: Path, processes: int, crc: bool) -> float:
    """Seconds from the first fork until the last process ended."""
    parts = spans(folder, processes)
    target.mkdir(parents=True, exist_ok=True)
    begun = time.perf_counter()
    started = [start(part, target / str(number), crc) for number, part in enumerate(parts)]
    failed = [pid for pid in started if os.waitpid(pid, 0)[1]]
    if failed:
        raise SystemExit(f"{len(failed)} of {processes} loops failed")
    return time.perf_counter() - begun


def start(part: list[Span], target: Path, crc: bool) -> int:
    """Forks one loop; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    try:
        move(part, target, crc)
    except BaseException:
        os._exit(1)
    os._exit(0)


def main() -> None:
    """Prints seconds."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--crc", action="store_true")
    options = parser.parse_args()
    print(run(options.source, options.target, options.processes, options.crc))


if __name__ == "__main__":
    main()
