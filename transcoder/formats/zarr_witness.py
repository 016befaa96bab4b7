"""tensorstore's view of zarr arrays that were written here: an independent reader must see what was planned."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

from transcoder.errors import UsageError
from transcoder.formats.grids import Grid
from transcoder.remote.paths import remote


def check_installed(form: str) -> None:
    """Raise UsageError where tensorstore is missing: nothing is written that it has not confirmed."""
    if find_spec("tensorstore") is None:
        raise UsageError(f"--format {form} needs tensorstore: pip install 'megatron-transcoder[zarr]'", kind="missing")


def confirm(form: str, folder: Path, grids: Mapping[str, Grid], index: Mapping[str, bytes | memoryview]) -> None:
    """Open every array with tensorstore. Raises RuntimeError for one whose type, shape or chunks are others.

    index: what describes them. In an object store it appears after the payloads; tensorstore gets it from memory then.
    """
    import tensorstore

    context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 0}, "data_copy_concurrency": {"limit": 1}})
    place = {"driver": "file", "path": f"{folder}/"}
    if remote(folder):
        place = {"driver": "memory", "path": ""}
        described = tensorstore.KvStore.open(place, context=context).result()
        for name, data in index.items():
            described.write(name, bytes(data)).result()
    for key, grid in grids.items():
        store = {**place, "path": f"{place['path']}{key}/"}
        array = tensorstore.open({"driver": form, "kvstore": store}, context=context, read=True).result()
        layout = array.chunk_layout
        found = array.dtype.name, array.shape, layout.write_chunk.shape, layout.read_chunk.shape
        if found != (grid.dtype.name, grid.shape, grid.cell, grid.inner):
            raise RuntimeError(f"{key}: tensorstore sees {found}, planned was {grid}")
