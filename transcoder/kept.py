"""What a conversion to Megatron loses and an export needs: kept beside the checkpoint, used again where it still fits.

These are the scales of a quantised original, with which a weight that was decoded to bfloat16 rounds back to exactly
the number it came from (blocks that training changed get fresh scales), tensors whose values Megatron stores shifted
by a constant, which rounds, and tensors that a model does not need but the original's files hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.codecs import FLOATS, Codec
from transcoder.disk import PIECE, File, close, make_durable, sized, write_all
from transcoder.formats.safetensors import Shard, emit_header, read_shard
from transcoder.paths import extent
from transcoder.planner import HfTensor
from transcoder.spec import DType, TensorSpec

if TYPE_CHECKING:
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import Array, Payloads
    from transcoder.exportplan import ExportPlan
    from transcoder.importing import ImportPlan
    from transcoder.ledger import Ledger
    from transcoder.megatron import Megatron
    from transcoder.merging import Merger
    from transcoder.progress import Tally

SCALES = 2.0**-117, 2.0**119  # an e4m3 number times one of these is an ordinary bfloat16 number
NAME = "hf-kept.safetensors"  # in the iteration's folder


def write_kept(plan: ImportPlan, path: Path, sync: bool) -> list[str]:
    """Copy what an export needs into one safetensors file, if there is any. Returns warnings."""
    from transcoder.engine import Payloads

    source = plan.source
    payloads = Payloads(source)
    parts = [part for codec in source.weights.codecs.values() for part in codec.parts[1:]]
    parts += [source.catalog[name] for name, tensor in plan.model.hf.items() if tensor.family.rule.plus]
    parts += [source.catalog[name] for name in plan.ignored]
    if not parts:
        return []
    header = emit_header([(part.name, part.dtype, part.shape) for part in parts], {"format": "pt"})
    file = sized(path, len(header) + sum(part.nbytes for part in parts))
    try:
        write_all(file, memoryview(header), 0)
        place = len(header)
        for part in parts:
            count, step = part.nbytes // part.dtype.size, PIECE // part.dtype.size
            for start in range(0, count, step):
                data = payloads.stored(part, start, min(start + step, count)).data.cast("B")
                write_all(file, data, place)
                place += len(data)
        if sync:
            make_durable(file)
    finally:
        close(file)
    return list(_extremes(payloads))


def copy_file(source: Path, folder: Path, sync: bool) -> None:
    """Carry what was kept beside one checkpoint over to another one."""
    if (source / NAME).is_file():
        view = extent(source / NAME)
        file = sized(folder / NAME, len(view))
        try:
            for start in range(0, len(view), PIECE):
                write_all(file, view[start : start + PIECE], start)
            if sync:
                make_durable(file)
        finally:
            close(file)


def _extremes(payloads: Payloads) -> Iterator[str]:
    for name, codec in payloads.weights.codecs.items():
        scales = payloads.stored(codec.parts[1], 0, codec.parts[1].nbytes // codec.parts[1].dtype.size)
        yield from _told(name, extremes(codec, scales))


def _told(name: str, count: int) -> Iterator[str]:
    if count:
        yield f"{name}: {count} of its scales are 0 or extreme; the original's small numbers cannot be given back"


def extremes(codec: Codec, scales: Array) -> int:
    """How many scales leave it open which small number a decoded value was."""
    import numpy as np

    if codec.name == "fp8":
        sizes = np.abs(scales.view(np.float32))
        return int(scales.size - np.count_nonzero((sizes >= SCALES[0]) & (sizes <= SCALES[1])))
    return int(np.count_nonzero(scales > 252) if codec.name == "mxfp4" else np.count_nonzero(scales == 0))


def kept_shards(source: Megatron) -> tuple[Path, tuple[Shard, ...]]:
    """The files that hold what was kept, and their folder: the original's, if the user gave it."""
    if source.original is not None:
        return source.original.path, source.original.shards
    path = source.path / NAME
    return source.path, (read_shard(path),) if path.is_file() else ()


class Kept:
    """Parts of the original: of the directory that was given, else those beside the checkpoint, else none."""

    def __init__(self, source: Megatron) -> None:
        from transcoder.engine import converted, stored

        self._stored, self._converted = stored, converted
        folder, shards = kept_shards(source)
        follow = source.original is not None and source.original.follow_links
        self._views = {shard.name: extent(folder / shard.name, follow) for shard in shards}
        self._specs = {spec.name: spec for shard in shards for spec in shard.tensors}

    def read(self, part: TensorSpec, start: int, stop: int) -> Array | None:
        """The elements [start, stop) of a part, or None when no older file holds it in this shape."""
        spec = self._specs.get(part.name)
        if spec is None or (spec.dtype, spec.shape) != (part.dtype, part.shape):
            return None
        return self._stored(self._views, spec, start, stop)

    def values(self, tensor: HfTensor, dtype: DType, start: int, stop: int) -> Array | None:
        """The original's elements [start, stop) of a tensor that Megatron stores shifted, if they are known."""
        spec = self._specs.get(tensor.name)
        if spec is None or spec.shape != tensor.shape or not tensor.family.rule.plus or spec.dtype.name not in FLOATS:
            return None
        known = self.read(spec, start, stop)
        return None if known is None else self._converted(known, spec.dtype, dtype)


def copy_kept(spec: TensorSpec, files: Mapping[str, File], kept: Kept, tally: Tally) -> None:
    """Write a tensor that no rule knows as the original has it."""
    data = kept.read(spec, 0, spec.nbytes // spec.dtype.size)
    _write(files, spec, 0, data)
    tally.moved(spec.nbytes)


def encode_weight(
    plan: ExportPlan,
    name: str,
    merger: Merger,
    files: Mapping[str, File],
    chunks: CheckedChunks,
    kept: Kept,
    ledger: Ledger,
    warnings: list[str],
    tally: Tally,
) -> None:
    """Collect one weight from its chunks and write it as its codec's parts; tell when scales had to be found anew."""
    from transcoder.engine import BAND, gather
    from transcoder.exporting import check_digest
    from transcoder.kernels.casts import finite
    from transcoder.ledger import Track

    source, codec, spec = plan.source, plan.weights.codecs[name], plan.weights.catalog[name]
    tensor, width = source.model.hf[name], spec.shape[-1]
    stored = source.stored(tensor)
    track = Track(ledger, name, tensor.shape, stored)
    fetch = chunks.reader(tensor, track.parts)
    for start, stop in codec.row_bands(BAND):
        places = codec.places(start, stop)
        if stop * width > track.stop:
            band = gather(source.atlas, tensor, start * width, stop * width, stored, fetch)
            track.tree.add(band)
            track.count("odd", not finite(band, stored.name))
            old = [kept.read(part, *place) for part, place in zip(codec.parts[1:], places[1:], strict=True)]
            known = tuple(part for part in old if part is not None)
            whole = known if len(known) == len(old) else None
            values = merger.converted(tensor, start * width, band, stored, spec.dtype)
            new = codec.encode(values, spec.dtype.name, whole)
            for part, place, array in zip(codec.parts, places, new, strict=True):
                _write(files, part, place[0], array)
            track.count("fresh", _differing(new[1], whole[0]) if whole else new[1].size)
            track.count("lost", extremes(codec, new[1]))
            track.reach(stop * width)
        tally.moved(sum((b - a) * part.dtype.size for part, (a, b) in zip(codec.parts, places, strict=True)))
    check_digest(plan, name, track.tree.text())
    warnings += _told(name, track.counts.get("lost", 0))
    if fresh := track.counts.get("fresh"):
        warnings.append(f"{name}: {fresh} of its scales were found anew, the others are the original's")
    tally.finished(tensor, odd=bool(track.counts.get("odd")))


def _differing(one: Array, two: Array) -> int:
    return int((one != two).sum())


def _write(files: Mapping[str, File], part: TensorSpec, start: int, array: Any) -> None:
    place = part.chunks[0].offset + start * part.dtype.size
    write_all(files[part.chunks[0].file], memoryview(array).cast("B"), place)
