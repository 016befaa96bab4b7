"""Which format a Megatron checkpoint has, by its marker files, and what reads each."""

from __future__ import annotations

from pathlib import Path

from transcoder.formats.foreign import recognised
from transcoder.formats.rankfiles import is_ranks, open_ranks
from transcoder.formats.store import Store
from transcoder.formats.torch_dist import open_torch_dist


def is_checkpoint(folder: Path) -> bool:
    """Whether the folder holds an iteration of a format that can be read."""
    return (folder / ".metadata").is_file() or is_ranks(folder)


def open_store(folder: Path) -> Store:
    """The checkpoint in an iteration directory. Raises InputError for anything that is not whole."""
    return recognised(open_torch_dist(folder)) if (folder / ".metadata").is_file() else open_ranks(folder)
