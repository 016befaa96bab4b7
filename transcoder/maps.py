"""The payload files of a checkpoint, mapped when they are first read, few at a time: zarr has one for every chunk."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from threading import Lock

from transcoder.paths import Extent, extent

LIMIT = 256  # files mapped at once, each of which costs a descriptor


class Maps:
    """The files of a folder by name; a view that somebody holds stays valid. Raises InputError, as `map_file` does."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, Lock()
        self._views: OrderedDict[str, Extent] = OrderedDict()

    def __getitem__(self, name: str) -> Extent:
        with self._lock:
            if name not in self._views:
                if len(self._views) >= LIMIT:
                    self._views.popitem(last=False)
                self._views[name] = extent(self._folder / name, root=self._folder)
            self._views.move_to_end(name)
            return self._views[name]
