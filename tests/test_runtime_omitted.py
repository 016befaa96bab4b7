"""Layers of multi-token prediction that a live model has not are left out by name; everything else stays strict."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import zoo
from models import make_model, read_config
from test_runtime_load import filled, spoiled

import transcoder
from transcoder import InputError, recipes
from transcoder.importing import plan_import
from transcoder.mesh import Mesh
from transcoder.recipe import Recipe
from transcoder.recipes import mtp, recipe_for
from transcoder.runtime.comparison import Chosen
from transcoder.runtime.omitted import optional_keys, optional_parts
from transcoder.runtime.session import open_model

LAYERS = 4
HEAD = {"enorm": (72,), "hnorm": (72,), "eh_proj": (72, 144), "shared_head.norm": (72,)}
COPIES = {"embed_tokens": "model.embed_tokens", "shared_head.head": "lm_head"}
KEYS = 10  # that Megatron stores of one such layer


def with_prediction(recipe: Recipe) -> Recipe:
    """Llama's recipe with layers of multi-token prediction in DeepSeek's names."""
    layer = tuple(rule for rule in recipe.rules if any("decoder.layers.{l}." in side.name for side in rule.mcore))
    return replace(
        recipe,
        name="llama-mtp",
        axes={**recipe.axes, **mtp.AXES},
        rules=recipe.rules + mtp.counted_on(layer),
        hf_variants={**recipe.hf_variants, **mtp.shown_by("model.layers.{m+l}.*")},
        mcore_variants={**recipe.mcore_variants, **mtp.KEYS},
    )


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A Llama with one more layer, that predicts the token after the next."""
    known = dict(recipes.registry()) | {"LlamaForCausalLM": with_prediction(recipe_for("LlamaForCausalLM"))}
    monkeypatch.setattr(recipes, "registry", lambda: known)
    folder = make_model("llama", tmp_path / "llama", shards=1)
    tensors, place = load_file(folder / "model.safetensors"), f"model.layers.{LAYERS}."
    tensors |= {
        name.replace("model.layers.0.", place): tensor.clone()
        for name, tensor in tensors.items()
        if name.startswith("model.layers.0.")
    }
    tensors |= {f"{place}{name}.weight": torch.rand(shape) for name, shape in HEAD.items()}
    tensors |= {f"{place}{name}.weight": tensors[f"{other}.weight"].clone() for name, other in COPIES.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(read_config(folder) | {"num_nextn_predict_layers": 1}))
    return folder


def test_the_rest_is_loaded_from_a_directory_and_what_is_left_out_is_named(source: Path) -> None:
    model = spoiled(source)
    report = transcoder.load(model, source)
    names = [name for name in load_file(source / "model.safetensors") if name.startswith(f"model.layers.{LAYERS}.")]
    assert report["left_out"] == sorted(names) and len(names) == 15
    (warning,) = report["warnings"]
    assert warning.startswith("15 tensors of multi-token prediction are left out, ") and sorted(names)[0] in warning
    want = load_file(source / "model.safetensors")[f"model.layers.{LAYERS - 1}.mlp.down_proj.weight"]
    assert torch.equal(filled(model)[f"decoder.layers.{LAYERS - 1}.mlp.linear_fc2.weight"], want)


@pytest.mark.parametrize("layout", ["stacked", "per-layer", "singleton"])
def test_the_rest_is_loaded_from_a_checkpoint_too(source: Path, tmp_path: Path, layout: str) -> None:
    transcoder.hf2mcore(source, tmp_path / "mcore", layout=layout, sync=False)
    one, two = spoiled(source), spoiled(source)
    report = transcoder.load(one, tmp_path / "mcore")
    transcoder.load(two, source)
    assert all(torch.equal(tensor, filled(two)[name]) for name, tensor in filled(one).items())
    count = KEYS + (layout == "singleton")  # gate and up have a key each
    assert len(report["left_out"]) == count and all(name.startswith("mtp.layers.0.") for name in report["left_out"])
    assert report["warnings"][0].startswith(f"{count} tensors of multi-token prediction are left out")


def test_other_tensors_are_refused_as_ever(source: Path, tmp_path: Path) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({**tensors, f"model.layers.{LAYERS}.extra.weight": torch.ones(3)}, source / "model.safetensors")
    with pytest.raises(InputError, match=rf"model.layers.{LAYERS}.extra.weight"):
        transcoder.load(spoiled(source), source)
    save_file(tensors, source / "model.safetensors")
    transcoder.hf2mcore(source, tmp_path / "mcore", sync=False)
    smaller = read_config(source) | {"num_hidden_layers": 3}
    with pytest.raises(InputError, match=r"expected a tensor of shape \[3, 72\]"):
        transcoder.load(spoiled(smaller), tmp_path / "mcore")


def test_a_model_without_such_layers_leaves_nothing_out(tmp_path: Path) -> None:
    folder = make_model("qwen3", tmp_path / "qwen3")
    report = transcoder.load(spoiled(folder), folder)
    assert report["left_out"] == report["warnings"] == []


def test_the_commands_are_told_what_is_left_out(source: Path) -> None:
    told: list[str] = []
    open_model(read_config(source), Chosen(source, source, Mesh(), "float32", "cpu"), told.extend)
    assert len(told) == 1 and "multi-token prediction" in told[0]


@pytest.mark.parametrize("kind", ["deepseek-v3-mtp", "glm4-moe-mtp", "qwen3-next-mtp"])
@pytest.mark.parametrize("layout", ["", "per-layer", "singleton"])
def test_the_rules_tell_the_keys_of_every_architecture(kind: str, layout: str) -> None:
    plan: Any = plan_import(zoo.made(kind), Mesh(), layout=layout)
    want = {key for key in plan.model.mcore if key.startswith("mtp.")}
    assert optional_parts(plan) == optional_keys(plan.model.mcore, plan.model.dialect) == want != set()
