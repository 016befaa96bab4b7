"""Which format a Megatron checkpoint has, by its marker files, and what reads and writes each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

from transcoder.errors import UsageError
from transcoder.formats import torch_dist_writer, zarr_writer
from transcoder.formats.foreign import recognised
from transcoder.formats.placement import Placement, Wanted
from transcoder.formats.rankfiles import is_ranks, open_ranks
from transcoder.formats.statefiles import backend_of
from transcoder.formats.store import Store
from transcoder.formats.torch_dist import open_torch_dist
from transcoder.formats.zarr_store import open_zarr

_READ: dict[object, Callable[[Path], Store]] = {
    "zarr": partial(open_zarr, form="zarr"),
    "zarr3": partial(open_zarr, form="zarr3"),
}
_PLACE: dict[str, Callable[[Iterable[Wanted], Iterable[str], int], Placement]] = {
    "torch_dist": torch_dist_writer.place,
    "zarr": lambda tensors, objects, ranks: zarr_writer.place("zarr", tensors, objects),
    "zarr3": lambda tensors, objects, ranks: zarr_writer.place("zarr3", tensors, objects),
}
NOTES = {
    "zarr": "zarr is loaded by megatron-core 0.15 and older; 0.16 and newer load torch_dist alone",
    "zarr3": "zarr3 is for tensorstore and zarr; megatron-core loads torch_dist, and zarr up to 0.15",
}


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds an iteration of a format that can be read."""
    return (folder / ".metadata").is_file() or _backend(folder) in _READ or is_ranks(folder)


def _backend(folder: Path) -> object:
    found = backend_of(folder) if (folder / "metadata.json").is_file() else None
    return found if isinstance(found, str) else None


def open_store(folder: Path) -> Store:
    """The checkpoint in an iteration directory. Raises InputError for anything that is not whole."""
    if (folder / ".metadata").is_file():
        return recognised(open_torch_dist(folder))
    return _READ.get(_backend(folder), open_ranks if is_ranks(folder) else open_torch_dist)(folder)


def place(form: str, tensors: Iterable[Wanted], objects: Iterable[str], ranks: int) -> Placement:
    """A file and an offset for every chunk, in a format. ranks: how many ranks write files, where ranks do.

    Raises UsageError for a format that is not known.
    """
    if form not in _PLACE:
        raise UsageError(f"format {form!r}: give one of {', '.join(_PLACE)}", kind="format")
    return _PLACE[form](tensors, objects, ranks)
