"""Any checkpoint as Hugging Face tensors, read band by band: what `verify`, `roundtrip` and `stream_hf` share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import numpy as np

from transcoder.chunks import CheckedChunks
from transcoder.engine import Array, Payloads, bands, converted, received
from transcoder.errors import InputError
from transcoder.formats.huggingface import is_hf, open_hf
from transcoder.kept import Kept
from transcoder.kernels.casts import to_float32
from transcoder.maps import Maps
from transcoder.megatron import Megatron, open_megatron
from transcoder.spec import DType
from transcoder.turned import Reader


@dataclass(frozen=True)
class View:
    """Tensors by Hugging Face name, and a reader of flat element ranges (raw bits)."""

    tensors: Mapping[str, tuple[DType, tuple[int, ...]]]
    read: Callable[[str, int, int], Array]
    finish: Callable[[], object] = lambda: None


def open_view(path: Path, hf_model: Path | None, follow_links: bool = False) -> View:
    """A view of a Hugging Face directory or a Megatron checkpoint, recognised by its marker files."""
    if is_hf(path):
        return hf_view(path, follow_links)
    return megatron_view(open_megatron(path, hf_model))


def open_views(one: Path, two: Path, follow_links: bool = False) -> tuple[View, View]:
    """Views of both; a Megatron checkpoint is seen in the spelling and dtypes of a Hugging Face directory beside it."""
    if is_hf(one) == is_hf(two):
        return open_view(one, None, follow_links), open_view(two, None, follow_links)
    directory = hf_view(one if is_hf(one) else two, follow_links)
    checkpoint = _seen_as(directory, two if is_hf(one) else one)
    return (directory, checkpoint) if is_hf(one) else (checkpoint, directory)


def _seen_as(directory: View, path: Path) -> View:
    shapes = {name: shape for name, (_, shape) in directory.tensors.items()}
    try:
        source = open_megatron(path, quantised=True, like=shapes)
    except InputError as error:
        if error.kind != "variant":
            raise
        source = open_megatron(path)
    either = {name for name, tensor in source.model.hf.items() if tensor.family.rule.dtype and name in shapes}
    found = {name: directory.tensors[name][0] for name in either}
    dtypes = {name: dtype for name, dtype in found.items() if source.model.hf[name].family.accepts(dtype, source.dtype)}
    return cast_view(megatron_view(source), dtypes)


def hf_view(path: Path, follow_links: bool = False) -> View:
    """A Hugging Face directory, read in place; quantised weights as the values they stand for."""
    source = open_hf(path, follow_links)
    tensors = {name: (spec.dtype, spec.shape) for name, spec in source.weights.catalog.items()}
    return View(tensors, Payloads(source).read)


def megatron_view(source: Megatron) -> View:
    """A Megatron checkpoint, gathered through its plan; checksums are compared on the way."""
    chunks, kept = CheckedChunks(Maps(source.path).__getitem__), Kept(source)
    tensors = {name: (source.stored(tensor), tensor.shape) for name, tensor in source.model.hf.items()}

    readers: dict[str, Reader] = {}

    def read(name: str, start: int, stop: int) -> Array:
        tensor, dtype = source.model.hf[name], tensors[name][0]
        if name not in readers:
            readers[name] = Reader(source.atlas, tensor, dtype, chunks.reader(tensor))
        band = readers[name].read(start, stop)
        return received(tensor, band, dtype, kept.values(tensor, dtype, start, stop))

    def finish() -> object:
        from transcoder.exporting import check_filler

        warnings = check_filler(source, chunks.fetch)
        chunks.finish()
        return warnings

    return View(tensors, read, finish)


def cast_view(view: View, dtypes: Mapping[str, DType]) -> View:
    """The same tensors, converted to other dtypes while they are read; `dtypes`: by name, of those that change."""
    tensors = {name: (dtypes.get(name, dtype), shape) for name, (dtype, shape) in view.tensors.items()}

    def read(name: str, start: int, stop: int) -> Array:
        return converted(view.read(name, start, stop), view.tensors[name][0], tensors[name][0])

    return View(tensors, read, view.finish)


def compare(one: View, two: View, only: set[str] | None = None) -> list[dict[str, Any]]:
    """The differences of two views: tensors on one side only, other shapes or dtypes, other bits.

    only: names that count; all by default.
    """
    found: list[dict[str, Any]] = []
    for name in [*one.tensors, *(name for name in two.tensors if name not in one.tensors)]:
        if only is not None and name not in only:
            continue
        if name not in one.tensors or name not in two.tensors:
            found.append(_incomparable(name, f"only in the {'second' if name in two.tensors else 'first'}"))
        elif one.tensors[name] != two.tensors[name]:
            texts = [f"{dtype.name} {list(shape)}" for dtype, shape in (one.tensors[name], two.tensors[name])]
            found.append(_incomparable(name, " against ".join(texts)))
        elif difference := _compare(one, two, name):
            found.append(difference)
    if not any("reason" in row for row in found):  # else some chunks were not read to their end
        one.finish(), two.finish()
    return found


def _incomparable(name: str, reason: str) -> dict[str, Any]:
    return {"tensor": name, "first_index": None, "max_abs": None, "count": None, "reason": reason}


def _compare(one: View, two: View, name: str) -> dict[str, Any] | None:
    dtype, shape = one.tensors[name]
    count, first, largest = 0, -1, 0.0
    for start, stop in bands(shape, dtype):
        a, b = one.read(name, start, stop), two.read(name, start, stop)
        places = np.flatnonzero(a != b)
        if places.size:
            first = first if first >= 0 else start + int(places[0])
            count += int(places.size)
            largest = float(np.maximum(largest, _distance(a[places], b[places], dtype)))  # keeps a NaN
    index = [int(i) for i in np.unravel_index(first, shape)] if count and prod(shape) else []
    return {"tensor": name, "first_index": index, "max_abs": _finite(largest), "count": count} if count else None


def numpy_dtype(dtype: DType) -> str:
    """NumPy's name for the values of a dtype; the bits where NumPy has no such type."""
    return dtype.name if dtype.name in ("float16", "float32", "float64") else f"<u{dtype.size}"


def _distance(a: Array, b: Array, dtype: DType) -> float:
    if dtype.name not in ("bfloat16", "float16", "float32"):
        return float("nan")
    with np.errstate(invalid="ignore"):
        gaps = np.abs(to_float32(a, dtype.name).astype(np.float64) - to_float32(b, dtype.name))
    return float(np.max(gaps))


def _finite(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if np.isfinite(value) else None
