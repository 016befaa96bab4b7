"""Real megatron-core loads the mixtures of experts that we write and saves those that we export, at any grid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import torch
from exports import assert_exports
from harness import launch
from matrix import ALL_EXPERT_KINDS, EXPERT_SPECS, Grid, Workshop, expert_grids_of, small_bands
from mistakes import MISTAKES, make_mistaken
from models import read_config
from oracle import read_tensors

Choice = tuple[str, Grid, str]  # kind, grid of megatron, layer spec
Case = dict[str, Any]
WRITTEN: tuple[Grid, ...] = ((1, 1, 1, 1), (2, 1, 2, 1), (1, 2, 4, 2), (4, 1, 1, 2), (2, 2, 2, 2), (1, 4, 4, 1))
EIGHT: tuple[Grid, ...] = ((2, 1, 4, 2), (1, 2, 4, 1), (1, 2, 2, 2), (4, 2, 4, 1), (4, 1, 4, 2))  # some of 8 ranks
DIALECTS = ("stacked", "per-layer", "singleton")
UNLIKE = ("qwen3-moe-mixed", "qwen3-moe-step")  # dense layers among sparse ones: per-layer keys, whatever is asked


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        small_bands(patch)
        yield Workshop(tmp_path_factory.mktemp("experts"))


def in_turn(grids: list[Grid], specs: tuple[str, ...]) -> list[Choice]:
    """Every kind with every spec, the grids in turn."""
    pairs = enumerate(product(ALL_EXPERT_KINDS, specs))
    return [(kind, grids[i % len(grids)], spec) for i, (kind, spec) in pairs]


def specs_in_turn(grids: list[Grid]) -> list[Choice]:
    """Every kind at every grid, the specs in turn."""
    pairs = enumerate(product(ALL_EXPERT_KINDS, grids))
    return [(kind, grid, EXPERT_SPECS[(i + i // len(grids)) % 3]) for i, (kind, grid) in pairs]


def full_choices(world: int) -> list[Choice]:
    """Every kind at every grid with every spec; at a world of 4 the specs in turn."""
    grids = expert_grids_of(world)
    return list(product(ALL_EXPERT_KINDS, grids, EXPERT_SPECS)) if world < 4 else specs_in_turn(grids)


def written_for(grid: Grid, turn: int) -> Grid:
    """One of the written grids that is not the loading one."""
    found = [each for each in WRITTEN if each != grid]
    return found[turn % len(found)]


def layout_for(kind: str, turn: int) -> str:
    """A dialect in which the kind can be written."""
    return (("per-layer", "singleton") if kind in UNLIKE else DIALECTS)[turn % (2 if kind in UNLIKE else 3)]


def load_cases(workshop: Workshop, choices: Iterable[Choice]) -> list[Case]:
    """Load at each place what was written at another grid, in each dialect in turn."""
    return [
        workshop.load_case(kind, written_for(grid, i + i // 6), grid, spec, layout=layout_for(kind, i // 2))
        for i, (kind, grid, spec) in enumerate(choices)
    ]


def save_cases(workshop: Workshop, choices: Iterable[Choice], dialects: Callable[[int], tuple[str, ...]]) -> list[Case]:
    """Save at each place; dialects: those for each choice by its number."""
    return [
        workshop.save_case(kind, grid, spec, dialect)
        for i, (kind, grid, spec) in enumerate(choices)
        for dialect in dialects(i)
    ]


def mistake_cases(root: Path, workshop: Workshop) -> list[Case]:
    """Compare with the right model what was converted from a wrong one."""
    cases = []
    for name, (kind, _, _) in MISTAKES.items():
        folder = root / name.replace(" ", "-")
        transcoder.hf2mcore(make_mistaken(name, workshop.model(kind), folder), folder.with_suffix(".mcore"), ep=2)
        files = {"hf": str(workshop.model(kind)), "ckpt": str(folder.with_suffix(".mcore") / "iter_0000000")}
        model = {"tp": 1, "pp": 1, "spec": "te", "strict": "raise_all"}
        cases.append({"action": "measure", "mistake": name, **files, **model})
    return cases


def run(cases: list[Case], world: int, root: Path) -> list[Case]:
    """One launch, in an order in which process groups are seldom made anew."""
    order = sorted(cases, key=lambda case: [case.get(name, 1) for name in ("tp", "pp", "ep", "etp")])
    return launch(order, world, root, timeout=900.0)


@pytest.fixture(scope="module")
def short(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], list[Case]]:
    """The results of the short matrix of a world."""

    def results(world: int) -> list[Case]:
        root, choices = tmp_path_factory.mktemp("short"), in_turn(expert_grids_of(world), EXPERT_SPECS)
        cases = load_cases(workshop, choices)
        cases += save_cases(workshop, choices, lambda i: (DIALECTS[(i + i // 3 + world) % 3],))
        cases += mistake_cases(root, workshop) if world == 1 else []
        return run(cases, world, root)

    return cache(results)


def only(results: list[Case], action: str) -> list[Case]:
    return [result for result in results if result["case"]["action"] == action]


def assert_loaded(results: list[Case]) -> None:
    """Every rank compared parameters, and logits are near: 1e-4 of their standard deviation at the worst position."""
    assert {result["case"]["spec"] for result in results} == set(EXPERT_SPECS)
    for result in results:
        assert result["ok"] and min(result["parameters"]) > 0, result
        assert result["max_abs"] <= result["bound"] <= 1e-4 * result["std"], result


def assert_saved(results: list[Case], folder: Path) -> None:
    """Every checkpoint exports as the files that it was filled from."""
    assert {result["case"]["dialect"] for result in results} == set(DIALECTS)
    for result in results:
        assert min(result["parameters"]) > 0, result
        assert_exports(result["case"], folder / "hf")


def test_the_short_matrix_has_every_kind_grid_spec_and_dialect() -> None:
    choices = in_turn(expert_grids_of(2), EXPERT_SPECS)
    turns = [(written_for(grid, i + i // 6), layout_for(kind, i // 2)) for i, (kind, grid, _) in enumerate(choices)]
    assert {(kind, spec) for kind, _, spec in choices} == {*product(ALL_EXPERT_KINDS, EXPERT_SPECS)}
    assert all(len({spec for _, other, spec in choices if other == grid}) > 1 for grid in expert_grids_of(2))
    assert {written for written, _ in turns} == set(WRITTEN)
    assert {layout for _, layout in turns} == set(DIALECTS)


@pytest.mark.parametrize("kind", ALL_EXPERT_KINDS)
def test_the_mixtures_are_awkward(workshop: Workshop, kind: str) -> None:
    tensors, config = read_tensors(workshop.model(kind)), read_config(workshop.model(kind))
    elements = torch.cat([tensor.flatten() for tensor in tensors.values()])
    sparse = {name.split(".")[2] for name in tensors if ".experts." in name}
    assert len(elements.unique()) == len(elements)
    assert (len(sparse) < config["num_hidden_layers"]) == (kind in UNLIKE)
    assert all(tensors[name].shape[1] == 46 for name in tensors if ".experts." in name and name.endswith("down_proj"))


@pytest.mark.parametrize("world", (1, 2))
def test_megatron_core_loads_every_mixture_bit_for_bit(
    short: Callable[[int], list[Case]], world: int, workshop: Workshop, proves: Callable[..., None]
) -> None:
    for claim in ("mcore", "logits"):
        proves(claim, *(read_config(workshop.model(kind))["architectures"][0] for kind in ALL_EXPERT_KINDS))
    assert_loaded(only(short(world), "load"))


@pytest.mark.parametrize("world", (1, 2))
def test_what_megatron_core_saves_of_mixtures_comes_back(
    short: Callable[[int], list[Case]], tmp_path: Path, world: int
) -> None:
    assert_saved(only(short(world), "save"), tmp_path)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_shows_in_its_parameters_alone_and_in_the_logits(
    short: Callable[[int], list[Case]], name: str
) -> None:
    result = next(result for result in only(short(1), "measure") if result["case"]["mistake"] == name)
    differing = [text.split()[:3] for text in result["differing"]]
    assert {parameter for *_, parameter in differing} == MISTAKES[name][2]
    assert len(differing) == 4 * len(MISTAKES[name][2])
    assert result["max_abs"] > 0.02 * result["std"] > 100 * result["bound"]


@pytest.mark.slow
@pytest.mark.parametrize("world", (1, 2, 4))
def test_megatron_core_loads_the_full_matrix_of_mixtures(workshop: Workshop, tmp_path: Path, world: int) -> None:
    assert_loaded(run(load_cases(workshop, full_choices(world)), world, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("world", (1, 2, 4))
def test_what_megatron_core_saves_of_mixtures_comes_back_in_the_full_matrix(
    workshop: Workshop, tmp_path: Path, world: int
) -> None:
    cases = save_cases(
        workshop, full_choices(world), lambda i: DIALECTS if world == 1 else (DIALECTS[(i + i // 3) % 3],)
    )
    assert_saved(run(cases, world, tmp_path), tmp_path)


@pytest.mark.slow
def test_megatron_core_loads_experts_over_eight_ranks(workshop: Workshop, tmp_path: Path) -> None:
    cases = load_cases(workshop, in_turn(list(EIGHT), EXPERT_SPECS))
    assert {(case["ep"], case["etp"]) for case in cases} == {(4, 2), (4, 1), (2, 2)}
    assert_loaded(run(cases, 8, tmp_path))
