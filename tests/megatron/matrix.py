"""What the megatron tests combine: models, grids and layer specs; models and checkpoints are made once."""

from __future__ import annotations

from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from models import EXPERT_KINDS, KINDS, make_model

import transcoder

Grid = tuple[int, ...]  # tp, pp; with experts also ep, etp

ALL_KINDS = tuple(KINDS)
GRIDS: tuple[Grid, ...] = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
SPECS = ("local", "te")
ALL_EXPERT_KINDS = tuple(EXPERT_KINDS)
EXPERT_SPECS = (*SPECS, "te-grouped")
STRICT = {"local": "raise_unexpected", "te": "raise_all", "te-grouped": "raise_all"}
SMALL_BAND = 2100  # bytes, 7 rows of 72 float32 numbers or 5 of 92: no matrix of the models is whole bands


def grids_of(world: int) -> list[Grid]:
    """Every grid of that many ranks."""
    return [(tp, world // tp) for tp in (4, 2, 1) if world % tp == 0]


def expert_grids_of(world: int) -> list[Grid]:
    """Every grid of that many ranks with experts over 1, 2 or 4 ranks, each of them cut into 1 or 2."""
    return [
        (tp, pp, ep, etp)
        for pp, tp, etp, ep in product((1, 2, 4), (1, 2, 4), (1, 2), (1, 2, 4))
        if world % (pp * tp) == 0 and (world // pp) % (ep * etp) == 0
    ]


def sizes(grid: Grid) -> dict[str, int]:
    """The sizes by name."""
    return dict(zip(("tp", "pp", "ep", "etp"), grid, strict=False))


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

    def _checkpoint(self, kind: str, written: Grid, dtype: str, layout: str, norms: str, form: str) -> Path:
        target = self.root / "-".join(map(str, (kind, *written, dtype, layout, norms, form)))
        options = {"dtype": dtype, "layout": layout, "norm_names": norms, "format": form, "sync": False}
        transcoder.hf2mcore(self.model(kind), target, **sizes(written), **options)
        return target / "iter_0000000"

    def load_case(
        self,
        kind: str,
        written: Grid,
        grid: Grid,
        spec: str,
        dtype: str = "",
        layout: str = "",
        form: str = "torch_dist",
    ) -> dict[str, Any]:
        """A worker's case: load what was written at one grid into a model at another."""
        norms = "local" if spec == "local" and kind in EXPERT_KINDS else "te"
        files = {"hf": str(self.model(kind)), "ckpt": str(self.checkpoint(kind, written, dtype, layout, norms, form))}
        model = {**sizes(grid), "spec": spec, "strict": STRICT[spec]}
        return {"action": "load", **files, **model, "dtype": dtype or "float32"}

    def save_case(
        self, kind: str, grid: Grid, spec: str, dialect: str, form: str = "torch_dist", dtype: str = "float32"
    ) -> dict[str, Any]:
        """A worker's case: megatron saves this model at a grid, in a dialect of keys and a format."""
        target = self.root / "-".join(map(str, (kind, spec, dialect, form, dtype, *grid))) / "iter_0000000"
        model = {**sizes(grid), "spec": spec, "dialect": dialect, "format": form, "dtype": dtype}
        return {"action": "save", "hf": str(self.model(kind)), "ckpt": str(target), **model}
