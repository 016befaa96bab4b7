"""Tiny models with layers of their own shape: the zoo's configs with small windows, all multipliers and caps in use.

Released models have most of these values too large or too near to 1 for a tiny model to show them.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import zoo
from command_line import EXAMPLE
from models import randomise

VOCABULARY = 1024  # of the example's tokenizer
WINDOW = 5
SLIDING, FULL = "sliding_attention", "full_attention"
YARN: dict[str, Any] = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}
# As Gemma 3's released files have them, but for the base of windows, whose effect a short prompt hides.
TWO_BASES = {
    FULL: {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    SLIDING: {"rope_type": "default", "rope_theta": 1e2},
}
# The zoo's kind, what differs from it, and the class of which its logits are a proof.
KINDS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "gpt-oss": (
        "gpt-oss",
        {"sliding_window": WINDOW, "num_experts_per_tok": 2, "swiglu_limit": 1.5, "rope_parameters": YARN},
        "GptOssForCausalLM",
    ),
    "gemma2": (
        "gemma2",
        {
            "head_dim": 8, "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
        "Gemma2ForCausalLM",
    ),
    "gemma3": (
        "gemma3",
        {
            "sliding_window": WINDOW, "query_pre_attn_scalar": 20, "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
            "rope_parameters": TWO_BASES,
        },
        "Gemma3ForCausalLM",
    ),
    "phi3": (
        "phi3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.75},
        },
        "Phi3ForCausalLM",
    ),
    "phi4": ("phi3", {"num_key_value_heads": 1}, "Phi3ForCausalLM"),
    "olmo2": ("olmo2", {"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "Olmo2ForCausalLM"),
    "olmo3": (
        "olmo3",
        {
            "sliding_window": WINDOW,
            "rope_parameters": {FULL: YARN, SLIDING: {"rope_type": "default", "rope_theta": 1e4}},
        },
        "Olmo3ForCausalLM",
    ),
    "granite": (
        "granite",
        {
            "embedding_multiplier": 12.0, "residual_multiplier": 0.22, "attention_multiplier": 0.05,
            "logits_scaling": 8.0,
        },
        "GraniteForCausalLM",
    ),
}  # fmt: skip
DENSE = tuple(kind for kind in KINDS if kind != "gpt-oss")
LAYERS = 4


@torch.no_grad()
def make_model(kind: str, directory: Path, **changes: Any) -> Path:
    """Write a model in float32, every parameter random, with the example's tokenizer."""
    import transformers

    name, changed, _ = KINDS[kind]
    known = zoo.KINDS[name]
    fields = {**known.fields, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, **changed, **changes}
    config = transformers.AutoConfig.for_model(known.model_type, **fields)
    model = getattr(transformers, known.writer)._from_config(config, dtype=torch.float32)
    randomise(model, 7)
    model.save_pretrained(directory)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / file, directory)
    return directory
