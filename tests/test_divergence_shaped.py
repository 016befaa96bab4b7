"""The finder names what is wrong in layers of their own shape: norms, scales, windows, sinks, caps, rotations."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from generating import torchrun

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import compare_worker as worker
from shaped_models import DENSE, FULL, KINDS, SLIDING, TWO_BASES, WINDOW, make_model

from transcoder.recipes import recipe_for
from transcoder.runtime.device import shutdown

Pair = tuple[str, str, str]


def attention(layer: int = 0) -> Pair:
    """What scores, windows and sinks change first."""
    inside = f"layers.{layer}.self_attn"
    return f"model.{inside}.o_proj", f"decoder.{inside}".replace("attn", "attention") + ".core_attention", "input"


def same(layer: int, hf: str, megatron: str, side: str = "output") -> Pair:
    """The pair of two modules of a layer."""
    return f"model.layers.{layer}.{hf}", f"decoder.layers.{layer}.{megatron}", side


def halves_exchanged(rows: torch.Tensor) -> torch.Tensor:
    return torch.cat(rows.chunk(2)[::-1])


ROTATION: Pair = ("model.rotary_emb", "rotary_pos_emb", "output")
LOGITS: Pair = ("logits", "output_layer", "output")
OFF = 1e9  # a soft-cap that changes nothing
# The mistake: kind, what is wrong in the weights or the configuration, the pair and the side that must be named.
MISTAKES: dict[str, tuple[str, Any, Pair]] = {
    "norm behind the feed-forward dropped": (
        "gemma2",
        worker.replaced("model.layers.2.post_feedforward_layernorm.weight", torch.zeros_like),
        same(2, "post_feedforward_layernorm", "mlp_bda.norm"),
    ),
    "norm before the feed-forward dropped": (
        "gemma3",
        worker.replaced("model.layers.1.pre_feedforward_layernorm.weight", torch.zeros_like),
        same(1, "pre_feedforward_layernorm", "pre_mlp_layernorm"),
    ),
    "norm behind attention dropped": (
        "olmo2",
        worker.replaced("model.layers.1.post_attention_layernorm.weight", torch.ones_like),
        same(1, "post_attention_layernorm", "self_attn_bda.norm"),
    ),
    "norm of queries dropped": (
        "gemma3",
        worker.replaced("model.layers.1.self_attn.q_norm.weight", torch.zeros_like),
        same(1, "self_attn.q_norm", "self_attention.q_layernorm"),
    ),
    "wide norm of keys dropped": (
        "olmo3",
        worker.replaced("model.layers.3.self_attn.k_norm.weight", torch.ones_like),
        same(3, "self_attn.k_norm", "self_attention.k_layernorm"),
    ),
    "scale of queries": ("gemma3", {"query_pre_attn_scalar": 24}, attention()),
    "scale of attention": ("granite", {"attention_multiplier": 0.06}, attention()),
    "window of gpt-oss off by one": ("gpt-oss", {"sliding_window": WINDOW + 1}, attention()),
    "window of gemma2 off by one": ("gemma2", {"sliding_window": WINDOW - 1}, attention()),
    "window of gemma3 off by one": ("gemma3", {"sliding_window": WINDOW + 1}, attention()),
    "window of phi3 off by one": ("phi3", {"sliding_window": WINDOW - 1}, attention()),
    "window of olmo3 off by one": ("olmo3", {"sliding_window": WINDOW + 1}, attention()),
    "sinks ignored": (
        "gpt-oss",
        worker.replaced("model.layers.1.self_attn.sinks", lambda sinks: torch.full_like(sinks, -1e4)),
        attention(1),
    ),
    "soft-cap of attention off": ("gemma2", {"attn_logit_softcapping": None}, attention()),
    "soft-cap of logits off": ("gemma2", {"final_logit_softcapping": OFF}, LOGITS),
    "scaling of logits off": ("granite", {"logits_scaling": 1.5}, LOGITS),
    "multiplier of embeddings off": (
        "granite",
        {"embedding_multiplier": 1.0},
        same(0, "input_layernorm", "input_layernorm", "input"),
    ),
    "multiplier of the residual stream off": (
        "granite",
        {"residual_multiplier": 1.0},
        same(0, "post_attention_layernorm", "pre_mlp_layernorm", "input"),
    ),
    "local base everywhere": (
        "gemma3",
        {"rope_parameters": TWO_BASES | {FULL: TWO_BASES[SLIDING]}},
        (f"model.rotary_emb.{FULL}", *ROTATION[1:]),
    ),
    "global base everywhere": (
        "gemma3",
        {"rope_parameters": TWO_BASES | {SLIDING: {"rope_type": "default", "rope_theta": 1e6}}},
        (f"model.rotary_emb.{SLIDING}", *ROTATION[1:]),
    ),
    "yarn dropped": ("gpt-oss", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ROTATION),
    "all of each head rotated": ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}, ROTATION),
    "gate and up in one tensor": (
        "phi4",
        worker.replaced("model.layers.1.mlp.gate_up_proj.weight", halves_exchanged),
        same(1, "mlp.gate_up_proj", "mlp.linear_fc1"),
    ),
    "bias of queries": (
        "gpt-oss",
        worker.replaced("model.layers.2.self_attn.q_proj.bias", torch.zeros_like),
        same(2, "self_attn.q_proj", "self_attention.linear_qkv"),
    ),
    "bias of the router": (
        "gpt-oss",
        worker.replaced("model.layers.1.mlp.router.bias", torch.zeros_like),
        same(1, "mlp.router", "mlp.router"),
    ),
    "bias of experts": (
        "gpt-oss",
        worker.replaced("model.layers.1.mlp.experts.down_proj_bias", torch.zeros_like),
        same(1, "mlp.experts", "mlp.experts"),
    ),
    "clamp of experts": ("gpt-oss", {"swiglu_limit": 7.0}, same(0, "mlp.experts", "mlp.experts")),
}
GRIDS: list[tuple[str, dict[str, Any]]] = [
    ("gpt-oss", {"tp": 2, "ep": 2}),
    ("gemma2", {"tp": 2}),
    ("gemma3", {"pp": 2, "dtype": "bfloat16"}),
    ("olmo3", {"tp": 2}),
    ("sinks ignored", {"tp": 2}),
    ("norm behind the feed-forward dropped", {"tp": 2}),
    ("soft-cap of logits off", {"pp": 2}),
    ("local base everywhere", {"pp": 2}),
    ("gate and up in one tensor", {"tp": 2}),
    ("wide norm of keys dropped", {"tp": 2}),
]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def case_of(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A function from a mistake (or the kind of a right model) to a worker's case."""
    root = tmp_path_factory.mktemp("shaped")
    return worker.cases(cache(lambda kind: make_model(kind, root / kind)), MISTAKES, root)


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_fails_and_its_module_is_named(name: str, case_of: Any) -> None:
    found = worker.run_case(case_of(name))
    assert not found["good"], found["checks"]
    assert tuple(found["first"]) == MISTAKES[name][2]


@pytest.mark.parametrize("kind", ("gemma2", "gemma3"))
def test_an_embedding_without_its_scale_is_named(kind: str, case_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(recipe_for(KINDS[kind][2]).runs, "embedding_multiplier")
    found = worker.run_case(case_of(kind))
    assert not found["good"], found["checks"]
    assert found["first"] == ["model.embed_tokens", "embedding.word_embeddings", "output"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_right_model_passes_in_bfloat16_with_the_same_bits(kind: str, dtype: str, case_of: Any) -> None:
    found = worker.run_case(case_of(kind) | {"dtype": dtype})
    assert found["good"] and found["first"] is None
    assert found["worst"] <= (5e-6 if dtype == "float32" or kind not in DENSE else 1e-8), found
    assert (found["largest"] == 0.0) == (dtype == "bfloat16" and kind in DENSE) or kind in ("phi3", "phi4")


def test_every_module_of_a_layer_is_paired(case_of: Any) -> None:
    pairs = {tuple(pair) for pair in worker.run_case(case_of("gemma3"))["pairs"]}
    hf = {reference.removeprefix("model.layers.3.") for reference, _, _ in pairs if ".layers.3." in reference}
    projections = {f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")}
    mlp = {f"mlp.{name}" for name in ("gate_proj", "up_proj", "down_proj")}
    places = ("input", "post_attention", "pre_feedforward", "post_feedforward")
    assert hf == projections | mlp | {"self_attn", "mlp"} | {f"{place}_layernorm" for place in places}
    assert {(f"model.rotary_emb.{kind}", *ROTATION[1:]) for kind in (FULL, SLIDING)} <= pairs


def test_every_grid_of_two_gives_the_same_answer(case_of: Any, tmp_path: Path) -> None:
    path = tmp_path / "cases.json"
    path.write_text(json.dumps([case_of(name) | grid for name, grid in GRIDS]))
    status, out, err = torchrun(2, str(Path(worker.__file__)), str(path))
    assert status == 0, f"{out}\n{err[-6000:]}"
    for (name, grid), found in zip(GRIDS, json.loads(Path(f"{path}.out").read_text()), strict=True):
        want = list(MISTAKES[name][2]) if name in MISTAKES else None
        assert (found["good"], found["first"]) == (want is None, want), (name, grid, found)
