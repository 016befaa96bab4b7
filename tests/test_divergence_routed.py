"""The finder names the module that is wrong, in models with latent attention or routers in DeepSeek's manner."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import torchrun

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import compare_worker as worker
from routed_models import KINDS, YARN, make_model
from test_gradients import statistics

from transcoder import UsageError
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import comparison, latent, routing
from transcoder.runtime.device import shutdown

Pair = tuple[str, str, str]


def layer(number: int, reference: str, module: str, side: str = "output") -> Pair:
    """A pair of modules of one layer."""
    return f"model.layers.{number}.{reference}", f"decoder.layers.{number}.{module}", side


ones, zeros = torch.ones_like, torch.zeros_like
ROUTER = ("mlp.gate", "mlp.router")
FACTOR = (0.1 * math.log(4) + 1) / (0.08 * math.log(4) + 1)  # of a yarn of 4 with mscale 1.0 over mscale_all_dim 0.8
# The mistake: kind, what is wrong in the weights or the configuration, the pair and the side that must be named.
MISTAKES: dict[str, tuple[str, Any, Pair]] = {
    "norm dropped": (
        "deepseek-v3",
        worker.replaced("model.layers.2.input_layernorm.weight", ones),
        layer(2, "input_layernorm", "input_layernorm"),
    ),
    "norm of the query dropped": (
        "deepseek-v2",
        worker.replaced("model.layers.1.self_attn.q_a_layernorm.weight", ones),
        layer(1, "self_attn.q_a_layernorm", "self_attention.q_layernorm"),
    ),
    "norm of the latent dropped": (
        "kimi-k2",
        worker.replaced("model.layers.3.self_attn.kv_a_layernorm.weight", ones),
        layer(3, "self_attn.kv_a_layernorm", "self_attention.kv_layernorm"),
    ),
    "softmax scale without mscale": (  # the factor on cosines and sines as it was
        "deepseek-v3",
        {"rope_scaling": {**YARN, "attention_factor": FACTOR}},
        layer(0, "self_attn.o_proj", "self_attention.core_attention", "input"),
    ),
    "another yarn": (
        "kimi-k2",
        {"rope_scaling": {**YARN, "factor": 8.0, "mscale": 1.0, "mscale_all_dim": 1.0}},
        ("model.rotary_emb", "rotary_pos_emb", "output"),
    ),
    "another yarn in V2": (
        "deepseek-v2",
        {"rope_parameters": {**YARN, "factor": 2.0, "mscale": 0.707, "mscale_all_dim": 0.707}},
        ("model.rotary_emb", "rotary_pos_emb", "output"),
    ),
    "router without bias": (
        "deepseek-v3",
        worker.replaced("model.layers.1.mlp.gate.e_score_correction_bias", zeros),
        layer(1, *ROUTER),
    ),
    "group limit off": ("deepseek-v3", {"n_group": 1, "topk_group": 1}, layer(1, *ROUTER)),
    "group limit off in V2": ("deepseek-v2", {"topk_method": "greedy"}, layer(1, *ROUTER)),
    "scaling of the routed experts": ("dots1", {"routed_scaling_factor": 1.0}, layer(1, *ROUTER)),
    "experts permuted": (
        "deepseek-v2-lite",
        worker.exchanged("experts", 2),
        layer(2, "mlp.experts", "mlp.experts"),
    ),
    "shared expert dropped": (
        "deepseek-v3",
        worker.replaced("model.layers.2.mlp.shared_experts.down_proj.weight", zeros),
        layer(2, "mlp.shared_experts.down_proj", "mlp.shared_experts.linear_fc2"),
    ),
    "shared expert dropped in GLM": (
        "glm4-moe",
        worker.replaced("model.layers.3.mlp.shared_experts.down_proj.weight", zeros),
        layer(3, "mlp.shared_experts.down_proj", "mlp.shared_experts.linear_fc2"),
    ),
    "bias of the query dropped": (
        "glm4-moe",
        worker.replaced("model.layers.1.self_attn.q_proj.bias", zeros),
        layer(1, "self_attn.q_proj", "self_attention.linear_qkv"),
    ),
    "norm of the keys dropped": (
        "glm4-moe-norms",
        worker.replaced("model.layers.2.self_attn.k_norm.weight", ones),
        layer(2, "self_attn.k_norm", "self_attention.k_layernorm"),
    ),
    "first dense layer": (
        "dots1",
        worker.replaced("model.layers.0.mlp.down_proj.weight", torch.neg),
        layer(0, "mlp.down_proj", "mlp.linear_fc2"),
    ),
}
GRIDS: tuple[tuple[str, dict[str, int]], ...] = (
    ("deepseek-v2", {"tp": 2}),
    ("deepseek-v3", {"ep": 2}),
    ("glm4-moe-norms", {"tp": 2}),
    ("norm of the query dropped", {"tp": 2}),
    ("norm of the latent dropped", {"pp": 2}),
    ("softmax scale without mscale", {"tp": 2}),
    ("router without bias", {"ep": 2}),
    ("experts permuted", {"ep": 2}),
    ("shared expert dropped", {"tp": 2}),
)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """A function from a mistake (or the kind of a right model) to a worker's case."""
    root = tmp_path_factory.mktemp("routed")
    return worker.cases(cache(lambda kind: make_model(kind, root / kind)), MISTAKES, root)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_and_its_module_is_named(name: str, case_of: Callable[[str], dict[str, Any]]) -> None:
    found = worker.run_case(case_of(name))
    assert not found["good"], found["checks"]
    assert tuple(found["first"]) == MISTAKES[name][2]


@pytest.mark.parametrize("kind", KINDS)
def test_a_right_model_passes(kind: str, case_of: Callable[[str], dict[str, Any]]) -> None:
    found = worker.run_case(case_of(kind))
    assert found["good"] and found["first"] is None and found["worst"] <= 3e-5, found


@pytest.mark.parametrize("kind", ["deepseek-v2", "deepseek-v3", "glm4-moe", "dots1"])
def test_a_right_model_passes_in_bfloat16_judged_in_float32(
    kind: str, case_of: Callable[[str], dict[str, Any]]
) -> None:
    found = worker.run_case(case_of(kind) | {"dtype": "bfloat16"})
    assert found["good"] and found["first"] is None
    assert found["largest"] > 1e-3 > found["worst"]
    assert all(check.startswith("float32: ") for check in found["checks"])


SKIPPED: dict[str, tuple[str, Any, str, Any, Pair]] = {
    "the norm of the query": (
        "deepseek-v3-pairs",
        latent.LatentNorm,
        "forward",
        lambda self, hidden: hidden,
        layer(0, "self_attn.q_a_layernorm", "self_attention.q_layernorm"),
    ),
    "the sum of two experts for a group": ("deepseek-v3-pairs", routing, "BEST", {"sigmoid": 1}, layer(1, *ROUTER)),
    "the epsilon of transformers": (
        "deepseek-v2",
        latent,
        "EPSILON",
        1e-2,
        layer(0, "self_attn.q_a_layernorm", "self_attention.q_layernorm"),
    ),
}


@pytest.mark.parametrize("name", SKIPPED)
def test_what_is_left_out_of_our_layers_is_named(
    name: str, case_of: Callable[[str], dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    kind, owner, attribute, instead, want = SKIPPED[name]
    monkeypatch.setattr(owner, attribute, instead)
    found = worker.run_case(case_of(kind))
    assert not found["good"] and tuple(found["first"]) == want


def test_every_module_of_latent_attention_is_paired(case_of: Callable[[str], dict[str, Any]]) -> None:
    pairs = {tuple(pair) for pair in worker.run_case(case_of("deepseek-v3"))["pairs"]}
    here = {reference.removeprefix("model.layers.3.") for reference, _, _ in pairs if ".layers.3." in reference}
    names = ("q_a_proj", "q_a_layernorm", "q_b_proj", "kv_a_proj_with_mqa", "kv_a_layernorm", "kv_b_proj", "o_proj")
    attention = {"self_attn", *(f"self_attn.{name}" for name in names)}
    shared = {f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")}
    assert here == attention | shared | {
        "mlp",
        "mlp.gate",
        "mlp.experts",
        "input_layernorm",
        "post_attention_layernorm",
    }
    assert layer(3, "self_attn.o_proj", "self_attention.core_attention", "input") in pairs
    assert {"model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"} <= {pair[0] for pair in pairs}


GRADIENTS = {
    "self_attention.linear_q_down_proj": "self_attn.q_a_proj",
    "self_attention.q_layernorm": "self_attn.q_a_layernorm",
    "self_attention.linear_q_up_proj": "self_attn.q_b_proj",
    "self_attention.linear_kv_down_proj": "self_attn.kv_a_proj_with_mqa",
    "self_attention.kv_layernorm": "self_attn.kv_a_layernorm",
    "self_attention.linear_kv_up_proj": "self_attn.kv_b_proj",
    "self_attention.linear_proj": "self_attn.o_proj",
    "mlp.router": "mlp.gate",
    "mlp.shared_experts.linear_fc2": "mlp.shared_experts.down_proj",
}


@pytest.mark.parametrize("kind", ["deepseek-v2", "deepseek-v3", "deepseek-v3-pairs"])
def test_gradients_are_those_of_transformers(kind: str, case_of: Callable[[str], dict[str, Any]]) -> None:
    found = worker.run_backward(case_of(kind))
    theirs, ours = (statistics(found[side], "weight_gradients") for side in ("hf", "megatron"))
    for number, (module, reference) in product(range(1, 4), GRADIENTS.items()):
        want = theirs[f"model.layers.{number}.{reference}.weight"][0]
        assert ours[f"decoder.layers.{number}.{module}.weight"][0] == pytest.approx(want, rel=5e-4, abs=1e-7), module


def test_gradients_of_cut_latent_attention_are_refused(case_of: Callable[[str], dict[str, Any]]) -> None:
    config = read_config(Path(case_of("deepseek-v3")["hf"]))
    with pytest.raises(UsageError, match="--backward: megatron-core's latent attention needs all heads on one rank"):
        comparison.enter(config, Mesh(tp=2), comparison.Watch(backward=True))


def test_every_grid_of_two_gives_the_same_answer(case_of: Callable[[str], dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case_of(name) | grid for name, grid in GRIDS]))
    status, out, err = torchrun(2, str(Path(worker.__file__)), str(path))
    assert status == 0, f"{out}\n{err[-6000:]}"
    for (name, grid), found in zip(GRIDS, json.loads(Path(f"{path}.out").read_text()), strict=True):
        want = list(MISTAKES[name][2]) if name in MISTAKES else None
        assert (found["good"], found["first"]) == (want is None, want), (name, grid, found)
