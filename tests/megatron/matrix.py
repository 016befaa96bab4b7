"""What the megatron tests combine: models, grids and layer specs; models and checkpoints are made once."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
from models import KINDS, make_model

import transcoder

Grid = tuple[int, int]  # tp, pp

ALL_KINDS = tuple(KINDS)
GRIDS: tuple[Grid, ...] = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
SPECS = ("local", "te")
STRICT = {"local": "raise_unexpected", "te": "raise_all"}
SMALL_BAND = 2100  # bytes, 7 rows of 72 float32 numbers or 5 of 92: no matrix of the models is whole bands


def grids_of(world: int) -> list[Grid]:
    """Every grid of that many ranks."""
    return [(tp, world // tp) for tp in (4, 2, 1) if world % tp == 0]


def other_grids(world: int, written: Grid) -> list[Grid]:
    """Grids of that many ranks other than the one that wrote; a world of one has none."""
    return [grid for grid in grids_of(world) if grid != written] or grids_of(world)


def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the converter cut even tiny tensors into many bands."""
    monkeypatch.setattr("transcoder.engine.BAND", SMALL_BAND)


class Workshop:
    """A folder with one Hugging Face model per kind and one checkpoint per kind, grid, dtype and key layout."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.checkpoint = cache(self._checkpoint)

    def _model(self, kind: str) -> Path:
        return make_model(kind, self.root / kind, shards=3)

    def _checkpoint(self, kind: str, written: Grid, dtype: str, layout: str) -> Path:
        tp, pp = written
        target = self.root / f"{kind}-tp{tp}-pp{pp}{dtype}{layout}"
        transcoder.hf2mcore(self.model(kind), target, tp=tp, pp=pp, dtype=dtype, layout=layout, sync=False)
        return target / "iter_0000000"

    def load_case(
        self, kind: str, written: Grid, grid: Grid, spec: str, dtype: str = "", layout: str = ""
    ) -> dict[str, Any]:
        """A worker's case: load what was written at one grid into a model at another."""
        files = {"hf": str(self.model(kind)), "ckpt": str(self.checkpoint(kind, written, dtype, layout))}
        model = {"tp": grid[0], "pp": grid[1], "spec": spec, "strict": STRICT[spec]}
        return {"action": "load", **files, **model, "dtype": dtype or "float32"}

    def save_case(self, kind: str, grid: Grid, spec: str, dialect: str) -> dict[str, Any]:
        """A worker's case: megatron saves this model at a grid, in a dialect of keys."""
        target = self.root / f"{kind}-{spec}-{dialect}-{grid[0]}-{grid[1]}" / "iter_0000000"
        model = {"tp": grid[0], "pp": grid[1], "spec": spec, "dialect": dialect}
        return {"action": "save", "hf": str(self.model(kind)), "ckpt": str(target), **model}
