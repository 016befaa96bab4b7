"""A wrong rule does not go unnoticed: parameters and exports differ in bits, logits differ from transformers."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

import transcoder
from transcoder.recipe import Recipe, Rule, rule
from transcoder.recipes import registry

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import torch
from harness import launch
from models import make_model
from oracle import read_tensors

H, D = "model.layers.{l}.", "decoder.layers.{l}."
HEADS = 4  # as many groups: k_proj has the shape of q_proj, and both are square
QKV = f"{D}self_attention.linear_qkv.weight (g [(q d) k v])/tp h"
V = f"{H}self_attn.v_proj.weight (g v) h"


def _replaced(recipe: Recipe, new: Rule) -> Recipe:
    """The recipe with another rule for the same Megatron tensor."""
    rules = tuple(new if old.mcore[0].name == new.mcore[0].name else old for old in recipe.rules)
    assert rules != recipe.rules
    return dataclasses.replace(recipe, rules=rules)


def gate_and_up_swapped(recipe: Recipe) -> Recipe:
    halves = (f"{H}mlp.up_proj.weight gate h", f"{H}mlp.gate_proj.weight up h")
    return _replaced(recipe, rule(f"{D}mlp.linear_fc1.weight [gate/tp up/tp] h", *halves))


def query_and_key_swapped(recipe: Recipe) -> Recipe:
    return _replaced(
        recipe, rule(QKV, f"{H}self_attn.k_proj.weight (g q d) h", f"{H}self_attn.q_proj.weight (g k) h", V)
    )


def groups_reversed(recipe: Recipe) -> Recipe:
    """One axis for the rows of each group, so that their order can be spelled."""
    axes = {f"{part}{group}": "d" for part in "qkv" for group in range(HEADS)}
    order = " ".join(f"{part}{group}" for group in reversed(range(HEADS)) for part in "qkv")
    sources = (
        f"{H}self_attn.{part}_proj.weight [{' '.join(f'{part}{group}' for group in range(HEADS))}] h" for part in "qkv"
    )
    changed = dataclasses.replace(recipe, axes={**recipe.axes, **axes})
    return _replaced(changed, rule(f"{D}self_attention.linear_qkv.weight [{order}]/tp h", *sources))


def groups_not_interleaved(recipe: Recipe) -> Recipe:
    sources = (f"{H}self_attn.q_proj.weight (g q d) h", f"{H}self_attn.k_proj.weight (g k) h", V)
    return _replaced(recipe, rule(f"{D}self_attention.linear_qkv.weight [(g q d) (g k) (g v)]/tp h", *sources))


def head_elements_exchanged_with_groups(recipe: Recipe) -> Recipe:
    wrong = f"{H}self_attn.o_proj.weight h (q d g)"
    return _replaced(recipe, rule(f"{D}self_attention.linear_proj.weight h (g q d)/tp", wrong))


def output_projection_transposed(recipe: Recipe) -> Recipe:
    wrong = f"{H}self_attn.o_proj.weight (g q d) h"
    return _replaced(recipe, rule(f"{D}self_attention.linear_proj.weight h (g q d)/tp", wrong))


FC1, QKV_NAME, PROJ = "mlp.linear_fc1.weight", "self_attention.linear_qkv.weight", "self_attention.linear_proj.weight"
QUERY, KEY, VALUE, OUTPUT = (f"self_attn.{part}_proj.weight" for part in "qkvo")
# The mistake, the Megatron parameter that it spoils, the Hugging Face tensors that it spoils.
MISTAKES: Mapping[str, tuple[Callable[[Recipe], Recipe], str, set[str]]] = {
    "gate and up swapped": (gate_and_up_swapped, FC1, {"mlp.gate_proj.weight", "mlp.up_proj.weight"}),
    "query and key swapped": (query_and_key_swapped, QKV_NAME, {QUERY, KEY}),
    "groups reversed": (groups_reversed, QKV_NAME, {QUERY, KEY, VALUE}),
    "groups not interleaved": (groups_not_interleaved, QKV_NAME, {QUERY, KEY, VALUE}),
    "head elements exchanged with groups": (head_elements_exchanged_with_groups, PROJ, {OUTPUT}),
    "output projection transposed": (output_projection_transposed, PROJ, {OUTPUT}),
}
Measured = dict[str, dict[str, Any]]


@contextmanager
def wrong_rules(name: str) -> Iterator[None]:
    """The converter with one mistake in its table."""
    mistake = MISTAKES[name][0]
    wrong = {key: mistake(recipe) if recipe.name == "llama" else recipe for key, recipe in registry().items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcoder.recipes.registry", lambda: wrong)
        yield


def _case(source: Path, target: Path, action: str) -> dict[str, Any]:
    """Convert with the rules of the moment; the worker's case."""
    transcoder.hf2mcore(source, target, tp=2, sync=False)
    files = {"hf": str(source), "ckpt": str(target / "iter_0000000")}
    return {"action": action, **files, "tp": 1, "pp": 1, "spec": "te", "strict": "raise_all"}


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Measured:
    """What megatron says of the right rules and of every mistake, and what it saves itself, from one launch."""
    root = tmp_path_factory.mktemp("rules")
    source = make_model("llama", root / "hf", num_attention_heads=HEADS, num_key_value_heads=HEADS)
    cases = {"right": _case(source, root / "right", "load"), "right again": _case(source, root / "again", "measure")}
    for name in MISTAKES:
        with wrong_rules(name):
            cases[name] = _case(source, root / name, "measure")
    cases["saved"] = {**cases["right"], "action": "save", "ckpt": str(root / "saved" / "iter_0000000")}
    return dict(zip(cases, launch(list(cases.values()), 1, root), strict=True))


def exported_differently(case: dict[str, Any], target: Path) -> set[str]:
    """Names of the tensors that do not come back from what megatron saved."""
    transcoder.mcore2hf(case["ckpt"], target, hf_model=case["hf"], sync=False)
    source, found = read_tensors(case["hf"]), read_tensors(target)
    assert source.keys() == found.keys()
    return {name.split(".", 3)[-1] for name in source if not torch.equal(source[name], found[name])}


def test_the_right_rules_pass_in_the_same_launch(measured: Measured) -> None:
    assert measured["right"]["ok"] and measured["right"]["max_abs"] <= measured["right"]["bound"]
    assert measured["right again"]["differing"] == []
    assert measured["right again"]["max_abs"] == measured["right"]["max_abs"]


def test_the_right_rules_export_what_megatron_saved(measured: Measured, tmp_path: Path) -> None:
    assert exported_differently(measured["saved"]["case"], tmp_path / "hf") == set()


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_rule_fails_the_logit_check(measured: Measured, name: str) -> None:
    result = measured[name]
    assert result["max_abs"] > 0.1 * result["std"] > 1000 * result["bound"]


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_rule_fails_the_bit_comparison_of_its_parameter_alone(measured: Measured, name: str) -> None:
    differing = measured[name]["differing"]
    assert len(differing) == 4
    assert all(f" {MISTAKES[name][1]} " in text for text in differing), differing


@pytest.mark.parametrize("name", MISTAKES)
def test_a_wrong_rule_fails_the_export_of_what_megatron_saved(measured: Measured, name: str, tmp_path: Path) -> None:
    with wrong_rules(name):
        differing = exported_differently(measured["saved"]["case"], tmp_path / "hf")
    assert differing == MISTAKES[name][2]
