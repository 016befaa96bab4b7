"""Which format a Megatron checkpoint has, by its marker files, and what reads and writes each."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from transcoder.errors import UsageError
from transcoder.formats import torch_dist_writer
from transcoder.formats.placement import Placement, Wanted
from transcoder.formats.store import Store
from transcoder.formats.torch_dist import open_torch_dist

FORMATS = ("torch_dist",)


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds an iteration of a format that can be read."""
    return (folder / ".metadata").is_file()


def open_store(folder: Path) -> Store:
    """The checkpoint in an iteration directory. Raises InputError for anything that is not whole."""
    return open_torch_dist(folder)


def place(form: str, tensors: Iterable[Wanted], objects: Iterable[str], ranks: int) -> Placement:
    """A file and an offset for every chunk, in a format. Raises UsageError for one that is not known."""
    if form != "torch_dist":
        raise UsageError(f"--format {form}: give one of {', '.join(FORMATS)}", kind="format")
    return torch_dist_writer.place(tensors, objects, ranks)
