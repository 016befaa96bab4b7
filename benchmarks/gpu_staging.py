"""Decodes FP8 blocks and transposes matrices between files, on the CPU's compiled kernels and staged through one GPU.

What decides is the whole way: bytes of a file (in the page cache) → values → bytes of a new file. The GPU's way has
pinned buffers, copies both ways on streams of their own and two blocks in flight; it needs torch and triton.

    python benchmarks/gpu_staging.py work/staging --gigabytes 4
"""

from __future__ import annotations

import argparse
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl

from transcoder.kernels import native, strided

ROWS, COLUMNS, BLOCK = 2048, 7168, 128  # of one FP8 matrix: 29 MB of bfloat16
HIGH, WIDE = 2880, 5760  # of one transposed matrix: 33 MB
PIECE = 1 << 20


@triton.jit
def _decode(codes, scales, out, columns, across, size: tl.constexpr):  # type: ignore[no-untyped-def]
    row, block = tl.program_id(0), tl.program_id(1)
    at = row * columns + block * size + tl.arange(0, size)
    scale = tl.load(scales + row // size * across + block)
    value = tl.load(codes + at).to(tl.float8e4nv, bitcast=True).to(tl.float32) * scale
    tl.store(out + at, value.to(tl.bfloat16))


class Fp8:
    """Blocks of FP8 codes with one matrix of scales for all."""

    taken, given = ROWS * COLUMNS, 2 * ROWS * COLUMNS  # bytes of a block in the source and in the target

    def __init__(self) -> None:
        self.scales = np.random.default_rng(1).uniform(1e-4, 1e-3, (ROWS // BLOCK, COLUMNS // BLOCK)).astype("f4")
        self.on_gpu = torch.from_numpy(self.scales).cuda()

    def source(self, number: int) -> np.ndarray[Any, Any]:
        """The bytes of a block: weights of a bell curve whose largest is 448, as codes."""
        values = torch.randn(self.taken, generator=torch.Generator().manual_seed(number)).clamp(-4, 4) * 112
        return np.asarray(values.to(torch.float8_e4m3fn).view(torch.uint8).numpy())

    def cpu(self, block: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """One block on the CPU."""
        codes = block.reshape(ROWS, COLUMNS)
        assert native.fp8_decode(codes, self.scales, (BLOCK, BLOCK), out.view(np.uint16).reshape(ROWS, COLUMNS))

    def gpu(self, block: torch.Tensor, out: torch.Tensor) -> None:
        """One block on the GPU."""
        across = COLUMNS // BLOCK
        _decode[(ROWS, across)](block, self.on_gpu, out.view(torch.bfloat16), COLUMNS, across, BLOCK)


class Transpose:
    """Matrices of 16-bit values, turned."""

    taken = given = 2 * HIGH * WIDE

    def source(self, number: int) -> np.ndarray[Any, Any]:
        """The bytes of a matrix."""
        return np.random.default_rng(number).integers(0, 256, self.taken, np.uint8)

    def cpu(self, block: np.ndarray[Any, Any], out: np.ndarray[Any, Any]) -> None:
        """One matrix on the CPU."""
        strided.copy(out.view(np.uint16).reshape(WIDE, HIGH), block.view(np.uint16).reshape(HIGH, WIDE).T)

    def gpu(self, block: torch.Tensor, out: torch.Tensor) -> None:
        """One matrix on the GPU."""
        out.view(torch.int16).view(WIDE, HIGH).copy_(block.view(torch.int16).view(HIGH, WIDE).T)


Work = Fp8 | Transpose


def on_cpu(work: Work, source: memoryview, target: int, blocks: range) -> None:
    """From the mapped file, decoded into one buffer, written."""
    out = np.empty(work.given, np.uint8)
    for number in blocks:
        block = np.frombuffer(source, np.uint8, work.taken, number * work.taken)
        work.cpu(block, out)
        write(target, out.data, number * work.given)


def on_gpu(work: Work, source: memoryview, target: int, blocks: range) -> None:
    """From the mapped file into pinned memory, to the GPU, back, written while the next one is on its way."""
    slots = [Slot(work) for _ in range(2)]
    busy: dict[int, int] = {}
    for turn, number in enumerate(blocks):
        slot = slots[turn % 2]
        if turn % 2 in busy:
            slot.collect(target, busy.pop(turn % 2) * work.given)
        slot.send(np.frombuffer(source, np.uint8, work.taken, number * work.taken))
        busy[turn % 2] = number
    for place, number in sorted(busy.items(), key=lambda entry: entry[1]):
        slots[place].collect(target, number * work.given)


class Slot:
    """Pinned and GPU memory of one block, and its stream."""

    def __init__(self, work: Work) -> None:
        self._work, self._stream = work, torch.cuda.Stream()
        self._taken = torch.empty(work.taken, dtype=torch.uint8, pin_memory=True)
        self._given = torch.empty(work.given, dtype=torch.uint8, pin_memory=True)
        self._there = torch.empty(work.taken, dtype=torch.uint8, device="cuda")
        self._made = torch.empty(work.given, dtype=torch.uint8, device="cuda")

    def send(self, block: np.ndarray[Any, Any]) -> None:
        """Start with a block."""
        self._taken.numpy()[:] = block
        with torch.cuda.stream(self._stream):
            self._there.copy_(self._taken, non_blocking=True)
            self._work.gpu(self._there, self._made)
            self._given.copy_(self._made, non_blocking=True)

    def collect(self, target: int, offset: int) -> None:
        """Wait for it and write it."""
        self._stream.synchronize()
        write(target, self._given.numpy().data, offset)


def write(file: int, data: memoryview, offset: int) -> None:
    """All of it, a MiB at a time."""
    for begin in range(0, len(data), PIECE):
        os.pwrite(file, data[begin : begin + PIECE], offset + begin)


Way = Callable[[Work, memoryview, int, range], None]
WAYS: dict[str, tuple[Way, int]] = {
    **{f"CPU, {workers} workers": (on_cpu, workers) for workers in (1, 2, 4, 8)},
    **{f"GPU, {workers} workers": (on_gpu, workers) for workers in (1, 2, 4)},
}


def timed(way: Way, workers: int, work: Work, source: memoryview, folder: Path, count: int) -> tuple[float, float]:
    """Wall and CPU seconds from the mapped source to new files, one a worker."""
    files = [os.open(folder / f"out{number}", os.O_RDWR | os.O_CREAT | os.O_TRUNC) for number in range(workers)]
    for file in files:
        os.posix_fallocate(file, 0, count * work.given)
    begun, cpu = time.perf_counter(), time.process_time()
    with ThreadPoolExecutor(workers) as pool:
        list(pool.map(lambda at: way(work, source, files[at], range(at, count, workers)), range(workers)))
    seconds = time.perf_counter() - begun, time.process_time() - cpu
    for file in files:
        os.close(file)
    return seconds


def sources(work: Work, folder: Path, count: int) -> memoryview:
    """The source's file, mapped."""
    path = folder / "in"
    path.write_bytes(b"".join(work.source(number % 4).tobytes() for number in range(count)))
    with path.open("rb") as file:
        return memoryview(mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ))


def same(work: Work) -> bool:
    """Whether both ways give the same bytes."""
    block, out = work.source(7), np.empty(work.given, np.uint8)
    work.cpu(block, out)
    made = torch.empty(work.given, dtype=torch.uint8, device="cuda")
    work.gpu(torch.from_numpy(block).cuda(), made)
    return bool(np.array_equal(made.cpu().numpy(), out))


def rows(work: Work, folder: Path, gigabytes: float, rounds: int) -> Iterator[str]:
    """One line for each way, all in turn."""
    count = max(4, int(gigabytes * 1e9 / work.given))
    source, found = sources(work, folder, count), {name: [] for name in WAYS}
    for number in range(rounds + 1):
        for name, (way, workers) in WAYS.items():
            seconds = timed(way, workers, work, source, folder, count)
            found[name] += [seconds] * (number > 0)  # the first round compiles and warms
    size = count * work.given / 1e9
    for name, samples in found.items():
        wall = [size / wall for wall, _ in samples]
        cpu = statistics.median(cpu for _, cpu in samples) / size
        yield f"| {type(work).__name__} | {name} | {max(wall):.2f}, {statistics.median(wall):.2f} | {cpu:.2f} |"


def main() -> None:
    """Measure both kinds of work, print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--gigabytes", type=float, default=4.0, help="of output")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    options.folder.mkdir(parents=True, exist_ok=True)
    print("| work | way | GB/s of output: best, median | CPU s/GB |\n| --- | --- | --- | --- |")
    for work in (Fp8(), Transpose()):
        assert same(work), type(work).__name__
        print(*rows(work, options.folder, options.gigabytes, options.rounds), sep="\n", flush=True)


if __name__ == "__main__":
    main()
