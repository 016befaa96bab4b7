"""What real megatron-core saves, in any dialect and at any grid, becomes the Hugging Face files it was filled from."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from exports import assert_exports, assert_same_tensors
from harness import launch
from matrix import ALL_KINDS, GRIDS, SPECS, Grid, Workshop, small_bands

DIALECTS = ("stacked", "per-layer", "singleton")
Choice = tuple[str, Grid, str, str]  # kind, grid, layer spec, dialect
Saved = Callable[[int], list[dict[str, Any]]]  # world → its cases


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        small_bands(patch)
        yield Workshop(tmp_path_factory.mktemp("saves"))


def grids(world: int) -> list[Grid]:
    return [grid for grid in GRIDS if grid[0] * grid[1] == world]


def short_choices(world: int) -> list[Choice]:
    """Every kind at worlds of 1 and 2, the rest in turn; at a world of 4 one kind per dialect."""
    found = []
    for i, kind in enumerate(ALL_KINDS if world < 4 else ALL_KINDS[:3]):
        turn = i + world
        found.append((kind, grids(world)[i % len(grids(world))], SPECS[turn // 3 % 2], DIALECTS[turn % 3]))
    return found


def full_choices(world: int) -> list[Choice]:
    """Every kind at every grid of the world, with both specs, in every dialect."""
    return list(product(ALL_KINDS, grids(world), SPECS, DIALECTS))


def save(workshop: Workshop, choices: list[Choice], workdir: Path, timeout: float = 240.0) -> list[dict[str, Any]]:
    """Let megatron save every choice in one launch; the cases."""
    cases = [workshop.save_case(*choice) for choice in sorted(choices, key=lambda choice: choice[1])]
    world = choices[0][1][0] * choices[0][1][1]
    results = launch(cases, world, workdir, timeout=timeout)
    assert len(results) == len(cases) > 0 and all(min(result["parameters"]) > 0 for result in results)
    return cases


@pytest.fixture(scope="module")
def saved(workshop: Workshop) -> Saved:
    """The short matrix of a world, saved once."""
    return cache(lambda world: save(workshop, short_choices(world), workshop.root))


def test_the_short_matrix_has_every_kind_grid_dialect_and_spec() -> None:
    choices = [choice for world in (1, 2, 4) for choice in short_choices(world)]
    assert {kind for kind, *_ in choices} == set(ALL_KINDS)
    assert {(spec, dialect) for *_, spec, dialect in choices} == set(product(SPECS, DIALECTS))
    assert {(grid, dialect) for _, grid, _, dialect in choices} >= set(product(GRIDS[:3], DIALECTS))
    assert {grid for _, grid, *_ in choices} == set(GRIDS)


@pytest.mark.parametrize("world", (2, pytest.param(4, marks=pytest.mark.slow)))
def test_what_megatron_core_saves_comes_back_bit_for_bit(saved: Saved, tmp_path: Path, world: int) -> None:
    for case in saved(world):
        assert_exports(case, tmp_path / "hf")


def test_what_one_rank_saves_comes_back_also_with_a_reference_of_config_json_alone(
    saved: Saved, tmp_path: Path
) -> None:
    for case in saved(1):
        assert_exports(case, tmp_path / "hf")
    for number, case in enumerate(saved(1)[:3]):
        reference, made = tmp_path / f"reference {number}", tmp_path / f"hf {number}"
        reference.mkdir()
        shutil.copy(Path(case["hf"]) / "config.json", reference)
        transcoder.mcore2hf(case["ckpt"], made, hf_model=reference, max_shard_size=100_000)
        assert len(list(made.glob("*.safetensors"))) > 1
        assert_same_tensors(Path(case["hf"]), made)


@pytest.mark.slow
@pytest.mark.parametrize("world", (1, 2, 4))
def test_what_megatron_core_saves_comes_back_in_the_full_matrix(workshop: Workshop, tmp_path: Path, world: int) -> None:
    for case in save(workshop, full_choices(world), tmp_path, timeout=900.0):
        assert_exports(case, tmp_path / "hf")
