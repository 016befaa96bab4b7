"""Real megatron-core 0.15.3 loads the zarr and torch_dist that we write, and what it saves as zarr comes back."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import cycle
from math import prod
from pathlib import Path
from typing import Any

import pytest

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from exports import assert_exports, assert_same_tensors
from harness import launch
from matrix import SPECS, Grid, Workshop, expert_grids_of, grids_of, small_bands
from old_core import interpreter

pytestmark = pytest.mark.slow
DENSE = ("llama", "llama-tied", "llama-attn-bias", "llama-bias", "qwen2", "qwen3", "mistral")
MIXTURES = ("qwen3-moe", "mixtral", "olmoe", "qwen3-moe-mixed", "qwen3-moe-step")
WRITTEN: tuple[Grid, ...] = ((1, 1), (2, 1), (1, 2), (2, 2), (4, 1))
EXPERTS_WRITTEN: tuple[Grid, ...] = ((1, 1, 1, 1), (2, 2, 2, 1), (1, 1, 4, 1), (2, 1, 1, 2), (1, 2, 2, 2), (4, 1, 2, 1))
TYPES = ("", "bfloat16")
CAP = 700  # bytes: every matrix of the models is cut, and the cuts are not those of any grid


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    with pytest.MonkeyPatch.context() as patch:
        small_bands(patch)
        yield Workshop(tmp_path_factory.mktemp("zarr"))


def choices(world: int) -> list[tuple[str, Grid, Grid, str, str]]:
    """Kind, grid written, grid loaded, layer spec, dtype: every grid of the world, kinds and the rest in turn."""
    found = []
    turns = cycle(DENSE), cycle(WRITTEN), cycle((*SPECS, *reversed(SPECS))), cycle(TYPES)
    for grid in grids_of(world) * 3:
        kind, written, spec, dtype = map(next, turns)
        found.append((kind, written, grid, spec, dtype))
    turns = cycle(MIXTURES), cycle(EXPERTS_WRITTEN), cycle((*SPECS, *reversed(SPECS))), cycle(TYPES)
    for grid in expert_grids_of(world):
        kind, written, spec, dtype = map(next, turns)
        found.append((kind, written, grid, spec, dtype))
    return found


def test_the_sample_has_every_kind_grid_spec_and_type() -> None:
    found = [choice for world in (1, 2, 4) for choice in choices(world)]
    assert {kind for kind, *_ in found} == {*DENSE, *MIXTURES}
    assert {written for _, written, *_ in found} == {*WRITTEN, *EXPERTS_WRITTEN}
    assert {(spec, dtype) for *_, spec, dtype in found} >= {(spec, dtype) for spec in SPECS for dtype in TYPES}
    assert {grid for _, _, grid, *_ in found} == {
        grid for world in (1, 2, 4) for grid in (*grids_of(world), *expert_grids_of(world))
    }


def load(workshop: Workshop, world: int, form: str) -> list[dict[str, Any]]:
    chosen = sorted(choices(world), key=lambda choice: choice[2])
    cases = [workshop.load_case(*choice, form=form) | {"logits": False} for choice in chosen]
    return launch(cases, world, workshop.root, timeout=600.0, python=interpreter())


@pytest.mark.parametrize(("world", "form"), [(1, "zarr"), (2, "zarr"), (4, "zarr"), (2, "torch_dist")])
def test_megatron_core_0_15_loads_every_parameter_bit_for_bit(workshop: Workshop, world: int, form: str) -> None:
    results = load(workshop, world, form)
    assert len(results) == len(choices(world))
    assert all(result["ok"] and min(result["parameters"]) > 0 for result in results)


def test_megatron_core_0_15_loads_arrays_whose_chunks_are_cut_further_than_any_grid(
    workshop: Workshop, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("transcoder.formats.zarr_writer.CAPS", {"zarr": CAP})
    capped = Workshop(workshop.root / "capped")
    cases = [
        capped.load_case(kind, (1, 1), grid, "te", "", form="zarr") | {"logits": False}
        for kind, grid in (("llama", (2, 1)), ("qwen3-moe", (1, 1, 2, 1)), ("llama-attn-bias", (1, 2)))
    ]
    folder = Path(cases[0]["ckpt"])
    fields = json.loads((folder / "embedding.word_embeddings.weight" / ".zarray").read_text())
    assert fields["shape"] == [384, 72] and prod(fields["chunks"]) * 4 <= CAP
    assert max(path.stat().st_size for path in folder.glob("*.weight/[0-9]*")) <= CAP
    assert all(result["ok"] for result in launch(cases, 2, capped.root, python=interpreter()))


def save(workshop: Workshop, chosen: list[tuple[str, Grid, str, str]], world: int, place: Path) -> list[dict[str, Any]]:
    """Let megatron-core 0.15.3 save every choice: kind, grid, layer spec, dialect; it hangs where there are arrays."""
    cases = [workshop.save_case(*choice, form="zarr") for choice in chosen]
    cases = [case | {"ckpt": str(place / f"saved {n}" / "iter_0000000")} for n, case in enumerate(cases)]
    launch(cases, world, workshop.root, timeout=600.0, python=interpreter())
    return cases


@pytest.mark.parametrize("world", (1, 2, 4))
def test_what_megatron_core_0_15_saves_as_zarr_comes_back_bit_for_bit(
    workshop: Workshop, tmp_path: Path, world: int
) -> None:
    dialects = cycle(("stacked", "per-layer"))
    chosen = sorted({(kind, grid, spec, next(dialects)) for kind, _, grid, spec, _ in choices(world)})
    cases = save(workshop, sorted(chosen, key=lambda choice: choice[1]), world, tmp_path)
    for number, case in enumerate(cases):
        assert transcoder.inspect(case["ckpt"])["format"] == "zarr"
        assert_exports(case, tmp_path / f"hf {number}")


def test_what_megatron_core_0_15_saves_is_resharded_to_torch_dist_and_zarr3(workshop: Workshop, tmp_path: Path) -> None:
    chosen = [(kind, (2, 1), "te", "stacked") for kind in ("llama", "llama-attn-bias")]
    cases = save(workshop, chosen, 2, tmp_path)
    for number, case in enumerate(cases):
        for form in ("torch_dist", "zarr3", "zarr"):
            there, back = tmp_path / f"{form} {number}", tmp_path / f"{form} {number} hf"
            transcoder.reshard(case["ckpt"], there, tp=4, format=form, hf_model=case["hf"], sync=False)
            transcoder.mcore2hf(there, back, sync=False)
            assert_same_tensors(Path(case["hf"]), back)


def test_our_files_are_those_of_megatron_core_0_15_byte_for_byte(workshop: Workshop, tmp_path: Path) -> None:
    (case,) = save(workshop, [("llama", (2, 1), "te", "stacked")], 2, tmp_path)
    ours, theirs = workshop.checkpoint("llama", (2, 1), "", "", "te", "zarr"), Path(case["ckpt"])
    chunks = {path.relative_to(theirs) for path in theirs.glob("decoder.*/[0-9]*")}
    assert len(chunks) > 30
    assert {path.relative_to(ours) for path in ours.glob("decoder.*/[0-9]*")} == chunks
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in chunks)
    for document in theirs.glob("decoder.*/.zarray"):
        assert json.loads(document.read_text()) == json.loads((ours / document.relative_to(theirs)).read_text())
    objects = {path.relative_to(theirs) for path in theirs.glob("*/shard_*.pt")}
    assert objects == {path.relative_to(ours) for path in ours.glob("*/shard_*.pt")} != set()
