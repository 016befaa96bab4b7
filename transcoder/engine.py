"""Move bytes: bands of Hugging Face tensors are scattered into Megatron chunks, or gathered from them.

A band is a contiguous range of rows of one tensor, about 4 MiB; it is also a leaf of the tensor's digest. Every source
byte is read once and every target byte written once. Workers own groups of tensors whose bytes go to different files.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from math import prod
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from transcoder.atlas import Atlas
from transcoder.codecs import Codec
from transcoder.errors import refuse
from transcoder.formats.huggingface import HfDirectory
from transcoder.kernels import strided
from transcoder.kernels.casts import add, cast
from transcoder.mapped import ready
from transcoder.moves import Copy, Run, runs
from transcoder.paths import Extent, extent
from transcoder.planner import HfTensor
from transcoder.progress import Cancelled
from transcoder.remote.files import RemoteFile
from transcoder.spec import Chunk, DType, TensorSpec
from transcoder.staging import STAGE, staging

BAND = 4 << 20  # bytes, a constant of the manifest's digests
Array = NDArray[Any]
Sink = Callable[[str, Chunk, int, memoryview], int]  # key, chunk, first payload byte, bytes → CRC-32; keeps no bytes
Fetch = Callable[[str, Chunk, int, int], memoryview]  # key, chunk, first payload byte, count → bytes


def bands(shape: tuple[int, ...], dtype: DType) -> Iterator[tuple[int, int]]:
    """The bands of a tensor as flat element ranges, whole rows of its last dimension.

    >>> from transcoder.spec import DTYPES
    >>> list(bands((3, 1 << 20), DTYPES["float32"]))
    [(0, 1048576), (1048576, 2097152), (2097152, 3145728)]
    """
    width = shape[-1] if len(shape) > 1 else 1
    step = max(1, BAND // max(1, width * dtype.size)) * width
    for start in range(0, prod(shape), max(1, step)):
        yield start, min(start + step, prod(shape))


def elements(data: memoryview, dtype: DType) -> Array:
    """Raw bytes as an array of unsigned integers of the dtype's width."""
    return np.frombuffer(data, dtype=f"<u{dtype.size}")


def stored(views: Mapping[str, Extent], spec: TensorSpec, start: int, stop: int) -> Array:
    """The elements [start, stop) of a tensor of a mapped safetensors file, in place. Raises InputError."""
    file, base, size = spec.chunks[0].file, spec.chunks[0].offset, spec.dtype.size
    return elements(ready(views[file], base + start * size, base + stop * size, file, spec.name), spec.dtype)


class Payloads:
    """The files of a Hugging Face directory, mapped; weights are read as flat element ranges (raw bits)."""

    def __init__(self, source: HfDirectory) -> None:
        self._views = {shard.name: extent(source.path / shard.name, source.follow_links) for shard in source.shards}
        self.weights = source.weights

    def bands(self, name: str) -> Iterator[tuple[int, int]]:
        """The bands in which a weight is best read: blocks of small numbers stay whole."""
        codec, spec = self.weights.codecs.get(name), self.weights.catalog[name]
        if codec is None:
            yield from bands(spec.shape, spec.dtype)
        else:
            for start, stop in codec.row_bands(BAND):
                yield start * spec.shape[-1], stop * spec.shape[-1]

    def read(self, name: str, start: int, stop: int) -> Array:
        """The elements [start, stop) of a weight; in place, unless they have to be decoded."""
        codec, spec = self.weights.codecs.get(name), self.weights.catalog[name]
        if codec is None:
            return self.stored(spec, start, stop)
        width, (first, last) = spec.shape[-1], self._rows(codec, spec, start, stop)
        values: Array = codec.decode(self.parts(codec, first, last), spec.dtype.name)
        return values[start - first * width : stop - first * width]

    def ahead(self, name: str, start: int, stop: int) -> None:
        """Begin to fetch what `read` will read, if it has to be fetched."""
        codec, spec = self.weights.codecs.get(name), self.weights.catalog[name]
        wanted = [(spec, (start, stop))]
        if codec is not None:
            wanted = list(zip(codec.parts, codec.places(*self._rows(codec, spec, start, stop)), strict=True))
        for part, (begin, end) in wanted:
            view, base = self._views[part.chunks[0].file], part.chunks[0].offset
            if isinstance(view, RemoteFile):
                view.ahead([(base + begin * part.dtype.size, base + end * part.dtype.size)])

    @staticmethod
    def _rows(codec: Codec, spec: TensorSpec, start: int, stop: int) -> tuple[int, int]:
        """The rows that have to be decoded for some elements."""
        width = spec.shape[-1]
        first = start // width // codec.rows * codec.rows
        return first, min(-(-stop // (width * codec.rows)) * codec.rows, prod(spec.shape[:-1]))

    def weigh(self, name: str, start: int, stop: int) -> int:
        """Stored bytes behind the elements [start, stop) of a band."""
        codec, spec = self.weights.codecs.get(name), self.weights.catalog[name]
        if codec is None:
            return (stop - start) * spec.dtype.size
        places = codec.places(start // spec.shape[-1], stop // spec.shape[-1])
        return sum((b - a) * part.dtype.size for part, (a, b) in zip(codec.parts, places, strict=True))

    def parts(self, codec: Codec, start: int, stop: int) -> tuple[Array, ...]:
        """What is stored of the rows [start, stop) of a weight that has a codec."""
        places = codec.places(start, stop)
        return tuple(self.stored(part, *place) for part, place in zip(codec.parts, places, strict=True))

    def stored(self, spec: TensorSpec, start: int, stop: int) -> Array:
        """The elements [start, stop) of a tensor as they are stored, in place."""
        return stored(self._views, spec, start, stop)


def scatter(atlas: Atlas, tensor: HfTensor, start: int, band: Array, sink: Sink) -> None:
    """Send the flat elements from `start`, given as `band`, to every chunk that holds them.

    Chunks take turns: gate and up lie in the same lines of memory, which the cache still has when the second comes.
    """
    limit = STAGE // band.itemsize
    turns = [_pieces(*piece, limit) for piece in atlas.pieces(tensor, start, start + band.size)]
    for key, chunk, run in filter(None, chain.from_iterable(zip_longest(*turns))):
        first = run.chunk * band.itemsize
        sink(key, chunk, first, _packed(band, run, chunk.offset + first).data.cast("B"))


def _pieces(key: str, chunk: Chunk, copy: Copy, limit: int) -> Iterator[tuple[str, Chunk, Run]]:
    for run in runs(copy):
        for part in (run,) if run.contiguous else run.parts(limit):
            yield key, chunk, part


def _packed(band: Array, run: Run, offset: int) -> Array:
    """The elements of a run one after the other, to be written at `offset` of a file."""
    if run.contiguous:
        return band[run.hf : run.hf + run.count]
    packed = staging(run.count * band.itemsize, offset, "run").view(band.dtype)
    strided.copy(packed.reshape(run.shape), strided.view(band, run.hf, run.shape, run.hf_steps))
    return packed


def gather(atlas: Atlas, tensor: HfTensor, start: int, stop: int, dtype: DType, fetch: Fetch) -> Array:
    """The flat elements [start, stop) of a tensor, collected from the chunks that hold them."""
    band = np.empty(stop - start, dtype=f"<u{dtype.size}")
    _collect(atlas.pieces(tensor, start, stop), dtype, fetch, band)
    return band


def gather_for(offset: int, atlas: Atlas, tensor: HfTensor, start: int, stop: int, dtype: DType, fetch: Fetch) -> Array:
    """Like `gather`, to be written at `offset` of a file before the thread asks for more.

    A view of the one chunk that holds the range, if one does.
    """
    pieces = list(atlas.pieces(tensor, start, stop))
    if len(pieces) == 1 and pieces[0][2].chunk_steps == (1,) == pieces[0][2].hf_steps:
        key, chunk, copy = pieces[0]
        return elements(fetch(key, chunk, copy.chunk * dtype.size, copy.count * dtype.size), dtype)
    band = staging((stop - start) * dtype.size, offset, "band").view(f"<u{dtype.size}")
    _collect(pieces, dtype, fetch, band)
    return band


def _collect(pieces: Iterable[tuple[str, Chunk, Copy]], dtype: DType, fetch: Fetch, band: Array) -> None:
    for key, chunk, copy in pieces:
        for run in runs(copy):
            data = elements(fetch(key, chunk, run.chunk * dtype.size, run.count * dtype.size), dtype)
            strided.copy(strided.view(band, run.hf, run.shape, run.hf_steps), data.reshape(run.shape))


def sent(tensor: HfTensor, band: Array, dtype: DType) -> Array:
    """What Megatron stores for the values `band` of a tensor; both as raw bits of `dtype`."""
    plus = tensor.family.rule.plus
    return add(band, dtype.name, plus) if plus else band


def received(tensor: HfTensor, band: Array, dtype: DType, kept: Array | None) -> Array:
    """The values of a tensor for which Megatron stores `band`: those `kept` from an older file where they fit."""
    plus = tensor.family.rule.plus
    if not plus:
        return band
    values = add(band, dtype.name, -plus)
    return values if kept is None else np.where(sent(tensor, kept, dtype) == band, kept, values)


def converted(band: Array, source: DType, target: DType) -> Array:
    """The band in the target dtype. Raises InputError when no cast between the two exists."""
    try:
        return cast(band, source.name, target.name)
    except KeyError as error:
        raise refuse("dtype", f"there is no cast from {source.name} to {target.name}") from error


def carried(tensor: HfTensor, band: Array, values: Array, source: DType, target: DType) -> Array:
    """What Megatron stores in the target dtype for the values of a tensor for which it stores `band` in the source's.

    A norm less one is rounded apart from its one in the source's dtype: it is shifted anew where that gives `band`.
    """
    wide = converted(band, source, target)
    if not tensor.family.rule.plus or source == target:
        return wide
    shifted = sent(tensor, converted(values, source, target), target)
    return np.where(sent(tensor, values, source) == band, shifted, wide)


class TreeDigest:
    """xxh3-128 of its leaves' xxh3-128 digests; a leaf is a band of the tensor in the checkpoint's dtype.

    leaves: the digests of those at the tensor's start, if they are known from before.
    """

    def __init__(self, shape: tuple[int, ...], dtype: DType, leaves: bytes = b"") -> None:
        self._leaf = next((stop - start for start, stop in bands(shape, dtype)), 1) * dtype.size  # bytes
        self._root, self._open, self._room = xxhash.xxh3_128(leaves), xxhash.xxh3_128(), self._leaf
        self._closed = bytearray()

    @property
    def even(self) -> bool:
        """Whether no leaf is open."""
        return self._room == self._leaf

    def add(self, band: Array) -> None:
        """The next elements, in order, however many."""
        data = band.data.cast("B")
        while len(data):
            self._open.update(data[: self._room])
            taken = min(self._room, len(data))
            data, self._room = data[taken:], self._room - taken
            if not self._room:
                self._close()

    def close(self) -> None:
        """Nothing follows: the last leaf may be shorter."""
        if not self.even:
            self._close()

    def _close(self) -> None:
        digest = self._open.digest()
        self._root.update(digest)
        self._closed += digest
        self._open.reset()
        self._room = self._leaf

    def drain(self) -> bytes:
        """The digests of the leaves that were closed since the last call."""
        closed, self._closed = bytes(self._closed), bytearray()
        return closed

    def text(self) -> str:
        """The digest as it stands in a manifest."""
        self.close()
        return f"xxh3-128/4MiB:{self._root.hexdigest()}"


def run_groups(groups: Iterable[list[Callable[[], None]]], workers: int, stop: threading.Event) -> None:
    """Run every job, groups in parallel, a group's jobs in order; the first error stops the rest and is raised.

    stop: set when somebody wants them to stop; jobs may look at it to end early.
    """

    def work(jobs: list[Callable[[], None]]) -> None:
        for job in jobs:
            if stop.is_set():
                return
            try:
                job()
            except Cancelled:
                return
            except BaseException:
                stop.set()
                raise

    with ThreadPoolExecutor(max_workers=max(1, workers)) as pool:
        try:
            for future in [pool.submit(work, jobs) for jobs in groups]:
                future.result()
        except RuntimeError as error:
            stop.set()
            if "thread" in str(error):  # there is no class of its own for "can't start new thread"
                raise MemoryError(str(error)) from error
            raise
        except BaseException:
            stop.set()
            raise
