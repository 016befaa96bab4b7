"""Rotary embeddings: float32 logits equal those of transformers, beyond the original context too, cached or not."""

from __future__ import annotations

import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder import InputError, UsageError

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from models import make_model, randomise, read_config
from test_vision_language import TEXT, VISION

from transcoder.runtime.load import load
from transcoder.runtime.model import KVCache, build, stage_forward
from transcoder.runtime.rotary import rope_settings, rotary

CONTEXT, LENGTH = 40, 150  # positions that the frequencies were made for, and that are tried
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 2.0, "high_freq_factor": 5.0}
ORIGINAL = {"original_max_position_embeddings": CONTEXT}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 5e5},
    "linear": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    "llama3": {**LLAMA3, **ORIGINAL, "rope_theta": 5e4},
    "yarn": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, **ORIGINAL},
    "yarn with its own factor": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "attention_factor": 1.3}
    | ORIGINAL,
    "yarn with other bounds": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 6.0, "beta_fast": 16, "beta_slow": 2}
    | ORIGINAL,
}
Logits = Any


def make(folder: Path, rope: dict[str, Any]) -> Path:
    """A tiny Llama with these settings, heads of 16."""
    sizes = {"head_dim": 16, "num_hidden_layers": 2, "max_position_embeddings": 4 * CONTEXT}
    return make_model("llama", folder, shards=1, rope_parameters=rope, **sizes)


def tokens_of(folder: Path) -> Logits:
    return torch.randint(read_config(folder)["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def reference(folder: Path, tokens: Any) -> Logits:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


def opened(folder: Path, config: dict[str, Any] | None = None) -> Any:
    model = build(config or folder, device="cpu")
    load(model, folder)
    return model


def in_parts(model: Any, tokens: Any, positions: Any = None) -> Logits:
    """Prompt, a longer part, then single tokens, through a cache."""
    cache = KVCache(model, len(tokens), tokens.shape[1])
    bounds = [0, 60, 140, *range(141, tokens.shape[1] + 1)]
    parts = []
    for start, stop in pairwise(bounds):
        placed = None if positions is None else positions[..., start:stop]
        parts.append(stage_forward(model, tokens[:, start:stop], placed, cache))
    assert cache.used == tokens.shape[1]
    return torch.cat(parts, 1)


def assert_near(found: Logits, want: Logits) -> None:
    assert found.shape == want.shape and found.dtype == torch.float32
    assert (found - want).abs().max() <= 1e-4 * want.std()


@pytest.mark.parametrize("name", ROPES)
def test_logits_equal_those_of_transformers_beyond_the_context(name: str, tmp_path: Path) -> None:
    folder = make(tmp_path / "model", ROPES[name])
    tokens, model = tokens_of(folder), opened(folder)
    want = reference(folder, tokens)
    assert_near(stage_forward(model, tokens), want)
    assert_near(in_parts(model, tokens), want)
    assert_near(stage_forward(model, tokens, last_only=True), want[:, -1:])
    if name != "default":
        plain = {"rope_type": "default", "rope_theta": ROPES[name]["rope_theta"]}
        dropped = opened(folder, read_config(folder) | {"rope_parameters": plain})
        assert (stage_forward(dropped, tokens) - want)[:, -50:].abs().max() > 0.1 * want.std()


@pytest.mark.parametrize("name", ROPES)
def test_the_older_spelling_gives_the_same_frequencies(name: str) -> None:
    rope = dict(ROPES[name])
    shape = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 4 * CONTEXT}
    older = {"rope_theta": rope["rope_theta"], "rope_scaling": {key: v for key, v in rope.items() if "rope" not in key}}
    older["rope_scaling"] |= {"type": rope["rope_type"]}
    if name == "default":
        older["rope_scaling"] = None
    (one, factor), (two, other) = rotary(shape | {"rope_parameters": rope}), rotary(shape | older)
    assert torch.equal(one, two) and factor == other
    assert one.dtype == torch.float32 and one.shape == (8,)


@pytest.mark.parametrize("kind", ("dynamic", "longrope", "su", "3d"))
def test_other_rotary_embeddings_are_refused_by_name(kind: str, tmp_path: Path) -> None:
    config = read_config(make(tmp_path / "model", ROPES["default"]))
    for spelled in ({"rope_type": kind, "factor": 2.0}, {"type": kind, "factor": 2.0}):
        with pytest.raises(InputError, match=f"expected default, linear, llama3, yarn; found rope_type '{kind}'"):
            build(config | {"rope_parameters": None, "rope_scaling": spelled})


def test_a_full_cache_is_a_usage_error(tmp_path: Path) -> None:
    folder = make(tmp_path / "model", ROPES["default"])
    model, tokens = opened(folder), tokens_of(folder)
    cache = KVCache(model, 2, 100)
    first = stage_forward(model, tokens[:, :100], cache=cache)
    with pytest.raises(UsageError, match=r"100 \+ 1 tokens do not fit a cache of 100"):
        stage_forward(model, tokens[:, 100:101], cache=cache)
    cache.reset()
    assert torch.equal(stage_forward(model, tokens[:, :100], cache=cache), first)


def vision_model(folder: Path, rope: dict[str, Any]) -> Any:
    """A tiny Qwen2.5-VL of transformers, written to a folder."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = TEXT | {"hidden_size": 96, "rope_parameters": rope, "max_position_embeddings": 4 * CONTEXT}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=VISION | {"out_hidden_size": 96})
    model = Qwen2_5_VLForConditionalGeneration(config).float().eval()
    randomise(model, 4)
    model.save_pretrained(folder)
    return model


def three_rows() -> Any:
    """Positions [3, 2, LENGTH] that never go down, other ones in every row and sequence."""
    steps = torch.randint(0, 2, (3, 2, LENGTH), generator=torch.Generator().manual_seed(8))
    return steps.cumsum(-1)


@pytest.mark.parametrize("kind", ("default", "yarn"))
def test_positions_with_three_rows_equal_those_of_transformers(kind: str, tmp_path: Path) -> None:
    rope = {**ROPES[kind], "mrope_section": [2, 3, 3]}
    reference_model = vision_model(tmp_path / "vl", rope)
    model = opened(tmp_path / "vl")
    tokens = torch.randint(TEXT["vocab_size"], (2, LENGTH), generator=torch.Generator().manual_seed(3))
    for positions in (three_rows(), torch.arange(LENGTH).expand(3, 2, LENGTH)):
        with torch.no_grad():
            want = reference_model(input_ids=tokens, position_ids=positions).logits
        assert_near(stage_forward(model, tokens, positions), want)
        assert_near(in_parts(model, tokens, positions), want)
    assert_near(stage_forward(model, tokens), want)
    embeddings = model.embedding(input_ids=tokens, position_ids=None).detach()
    assert_near(stage_forward(model, torch.zeros_like(tokens), embeddings=embeddings), want)


def test_sections_that_do_not_add_up_are_refused(tmp_path: Path) -> None:
    rope = {**ROPES["default"], "mrope_section": [2, 3, 3]}
    vision_model(tmp_path / "vl", rope)
    config = read_config(tmp_path / "vl")
    config["text_config"]["rope_parameters"]["mrope_section"] = [2, 3, 4]
    with pytest.raises(InputError, match=r"three numbers that add up to 8; found mrope_section \[2, 3, 4\]"):
        build(config)


def test_the_kind_that_released_vision_models_name_means_default_frequencies() -> None:
    found = rope_settings({"rope_theta": 1e6, "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}})
    assert found == {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
