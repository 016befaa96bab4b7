"""Real megatron-core loads what we write, strictly, and its float32 logits agree with transformers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import torch
from harness import launch
from matrix import ALL_KINDS, GRIDS, SMALL_BAND, SPECS, Grid, Workshop, grids_of, other_grids, small_bands
from models import read_config
from oracle import read_tensors

Choice = tuple[str, Grid, Grid, str]  # kind, grid written, grid loaded, layer spec
SHORT_WORLDS = (1, 2)


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        small_bands(patch)
        yield Workshop(tmp_path_factory.mktemp("loads"))


def short_choices(world: int) -> list[Choice]:
    """Every kind with both specs, the grids in turn."""
    found, loaded = [], grids_of(world)
    for i, (kind, spec) in enumerate(product(ALL_KINDS, SPECS)):
        grid = loaded[i // 2 % len(loaded)]
        written = [other for other in GRIDS if other != grid]
        found.append((kind, written[(i + i // 2) % len(written)], grid, spec))
    return found


def full_choices(world: int) -> list[Choice]:
    """Every kind, written at every grid, with both specs, at every other grid of the world."""
    return [
        (kind, written, grid, spec)
        for kind, written, spec in product(ALL_KINDS, GRIDS, SPECS)
        for grid in other_grids(world, written)
    ]


def by_grid(choices: list[Choice]) -> list[Choice]:
    """In an order in which process groups are seldom made anew."""
    return sorted(choices, key=lambda choice: choice[2])


def assert_loaded(results: list[dict[str, Any]], cases: int) -> None:
    """Every case is there, compared parameters on every rank and logits within the bound."""
    assert len(results) == cases > 0
    for result in results:
        assert result["ok"] and min(result["parameters"]) > 0, result
        if result["case"]["dtype"] == "float32":
            assert result["max_abs"] <= result["bound"] < 1e-3, result


def test_the_short_matrix_has_every_kind_written_grid_and_spec() -> None:
    choices = [choice for world in SHORT_WORLDS for choice in short_choices(world)]
    assert {(kind, spec) for kind, _, _, spec in choices} == set(product(ALL_KINDS, SPECS))
    assert {(written, spec) for _, written, _, spec in choices} == set(product(GRIDS, SPECS))
    assert {grid for _, _, grid, _ in choices} == {(1, 1), (2, 1), (1, 2)}
    assert all(written != grid for _, written, grid, _ in choices)


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_models_are_awkward(workshop: Workshop, kind: str) -> None:
    tensors = read_tensors(workshop.model(kind))
    elements = torch.cat([tensor.flatten() for tensor in tensors.values()])
    matrices = [tensor.shape for tensor in tensors.values() if tensor.dim() == 2]
    assert len(elements.unique()) == len(elements)
    assert all(rows % (SMALL_BAND // (4 * width)) for rows, width in matrices)
    assert tensors["model.embed_tokens.weight"].shape[0] % 2 == 1
    assert any(rows == width for rows, width in matrices) == (kind not in ("mistral", "qwen3"))


@pytest.mark.parametrize("world", SHORT_WORLDS)
def test_megatron_core_loads_every_family_bit_for_bit(
    workshop: Workshop, tmp_path: Path, world: int, proves: Callable[..., None]
) -> None:
    for claim in ("mcore", "logits"):
        proves(claim, *(read_config(workshop.model(kind))["architectures"][0] for kind in ALL_KINDS))
    cases = [workshop.load_case(*choice) for choice in by_grid(short_choices(world))]
    loaded = grids_of(world)[0]
    cases += [workshop.load_case("llama", (2, 2), loaded, spec, dtype="bfloat16") for spec in SPECS]
    cases += [
        workshop.load_case(kind, (2, 2), loaded, SPECS[(i + turn) % 2], layout=layout)
        for turn, layout in enumerate(("per-layer", "singleton"))
        for i, kind in enumerate(ALL_KINDS)
    ]
    assert_loaded(launch(cases, world, tmp_path), len(cases))


@pytest.mark.slow
@pytest.mark.parametrize("world", (1, 2, 4))
def test_megatron_core_loads_the_full_matrix(workshop: Workshop, tmp_path: Path, world: int) -> None:
    cases = [workshop.load_case(*choice) for choice in by_grid(full_choices(world))]
    assert_loaded(launch(cases, world, tmp_path, timeout=900.0), len(cases))
