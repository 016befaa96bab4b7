"""Models that megatron-core builds with its own specs for Transformer Engine ask for what we write, key by key.

They load it at the strictest level, hold every parameter bit for bit, and what they save exports to the source.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import harness
import torch
import zoo

Case = dict[str, Any]
Grid = tuple[int, int, int]  # tp, ep, etp

MIXTURES = (
    "deepseek-v2", "deepseek-v2-lite", "deepseek-v3", "deepseek-v3-mtp", "deepseek-v3-sparse", "dots1", "glm4-moe",
    "glm4-moe-mtp", "gpt-oss", "kimi-k2", "nemotron-h-moe", "qwen3-moe", "qwen3-next", "qwen3-next-mtp",
)  # fmt: skip
KINDS = (*MIXTURES, "nemotron-h")
ALIKE = ("deepseek-v3-sparse", "gpt-oss", "qwen3-moe")  # layers in one tensor, unless asked for one by one
WHOLE_BIASES = ("gpt-oss",)  # megatron-core refuses to cut experts that have biases


class Workshop:
    """A folder with one Hugging Face model per kind and one checkpoint per kind, grid, key layout and norm names."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.model = cache(self._model)
        self.checkpoint = cache(self._checkpoint)

    def _model(self, kind: str) -> Path:
        return zoo.save(kind, self.root / kind, shards=3)

    def _checkpoint(self, kind: str, grid: Grid, layout: str, norm_names: str) -> Path:
        target = self.root / "-".join(map(str, (kind, *grid, layout, norm_names)))
        options = {"layout": layout, "norm_names": norm_names, "sync": False}
        transcoder.hf2mcore(self.model(kind), target, **sizes(grid), **options)
        return target / "iter_0000000"

    def classes(self) -> set[str]:
        """The Hugging Face classes of the kinds."""
        return {zoo.read_config(self.model(kind))["architectures"][0] for kind in KINDS}

    def load_case(self, kind: str, written: Grid, loaded: Grid, layout: str = "", norm_names: str = "te") -> Case:
        """Load at one grid what was written at another."""
        checkpoint = self.checkpoint(kind, written, layout, norm_names)
        return {"action": "keys", "hf": str(self.model(kind)), "ckpt": str(checkpoint), **sizes(loaded)}

    def save_case(self, kind: str, grid: Grid) -> Case:
        """Megatron saves a model at a grid."""
        target = self.root / "-".join(map(str, ("saved", kind, *grid))) / "iter_0000000"
        return {"action": "save-keys", "hf": str(self.model(kind)), "ckpt": str(target), **sizes(grid)}


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Workshop]:
    some = zoo.ALL_KINDS["deepseek-v3-mtp"]
    sparse = replace(some, fields={**some.fields, "first_k_dense_replace": 0})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(harness, "WORKER", harness.WORKER.with_name("key_worker.py"))
        patch.setattr(zoo, "ALL_KINDS", {**zoo.ALL_KINDS, "deepseek-v3-sparse": sparse})
        yield Workshop(tmp_path_factory.mktemp("keys"))


def sizes(grid: Grid) -> dict[str, int]:
    """The sizes by name."""
    return dict(zip(("tp", "ep", "etp"), grid, strict=True))


def grid_of_two(kind: str, turn: int) -> Grid:
    """Two ranks: half of the experts each, or half of every expert each."""
    if kind not in MIXTURES:
        return (2, 1, 1)
    return (2, 1, 2) if turn % 2 and kind not in WHOLE_BIASES else (2, 2, 1)


def assert_found(results: list[Case], cases: int) -> None:
    """Every case compared parameters on every rank."""
    assert len(results) == cases > 0
    assert all(result["ok"] and min(result["parameters"]) > 10 for result in results)


def assert_rounded(source: zoo.Tensors, exported: zoo.Tensors) -> None:
    """The same tensors, but for those that a model in bfloat16 cannot keep in float32."""
    assert {name: (x.dtype, x.shape) for name, x in source.items()} == {
        name: (x.dtype, x.shape) for name, x in exported.items()
    }
    for name, tensor in source.items():
        lossy = name.endswith((".A_log", ".D"))
        assert torch.equal(exported[name], tensor.bfloat16().to(tensor.dtype) if lossy else tensor), name


def test_one_rank_asks_for_what_two_wrote(workshop: Workshop, tmp_path: Path, proves: Callable[..., None]) -> None:
    proves("mcore", *workshop.classes())
    cases = [workshop.load_case(kind, grid_of_two(kind, n), (1, 1, 1)) for n, kind in enumerate(KINDS)]
    assert_found(harness.launch(cases, 1, tmp_path), len(KINDS))


@pytest.mark.slow
def test_two_ranks_ask_for_what_one_wrote(workshop: Workshop, tmp_path: Path, proves: Callable[..., None]) -> None:
    proves("mcore", *workshop.classes())
    choices = [(kind, "") for kind in KINDS] + [(kind, "singleton") for kind in KINDS]
    choices += [(kind, "per-layer") for kind in ALIKE]
    cases = [
        workshop.load_case(kind, (1, 1, 1), grid_of_two(kind, n), layout) for n, (kind, layout) in enumerate(choices)
    ]
    assert_found(harness.launch(cases, 2, tmp_path), len(choices))


@pytest.mark.slow
def test_what_two_ranks_save_exports_to_the_source(workshop: Workshop, tmp_path: Path) -> None:
    cases = [workshop.save_case(kind, grid_of_two(kind, n + 1)) for n, kind in enumerate(KINDS)]
    assert_found(harness.launch(cases, 2, tmp_path), len(KINDS))
    for case in cases:
        target = tmp_path / "back" / Path(case["hf"]).name
        transcoder.mcore2hf(case["ckpt"], target, hf_model=case["hf"], sync=False)
        assert_rounded(zoo.read(Path(case["hf"])), zoo.read(target))


def test_a_key_under_another_name_is_noticed_on_both_sides(workshop: Workshop, tmp_path: Path) -> None:
    case = workshop.load_case("qwen3-moe", (1, 1, 1), (1, 1, 1), norm_names="local")
    with pytest.raises(AssertionError) as caught:
        harness.launch([case], 1, tmp_path)
    assert "the file lacks decoder.layers.pre_mlp_layernorm.weight\n" in str(caught.value)
    assert "nobody asks for decoder.layers.mlp.linear_fc1.layer_norm_weight\n" in str(caught.value)
