"""Tiny models with routers like DeepSeek's or latent attention: the zoo's configs, weights that make them talk."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import zoo
from command_line import EXAMPLE
from models import distinct_values, randomise

VOCABULARY = 1024  # of the example's tokenizer
YARN: dict[str, Any] = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32, "beta_fast": 32.0,
    "beta_slow": 1.0,
}  # fmt: skip
MSCALES = {"mscale": 1.0, "mscale_all_dim": 0.8}  # different ones leave a factor on cosines and sines
PARTIAL = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}
# The zoo's kind, what differs from it, and the class of which its logits are a proof. As in the released configs, a
# group holds twice the experts that are chosen from it in V3, more than one in V2, and Kimi K2 has one group.
KINDS: Mapping[str, tuple[str, dict[str, Any], str]] = {
    "deepseek-v2": (
        "deepseek-v2",
        {"num_experts_per_tok": 4, "rope_parameters": {**YARN, "mscale": 0.707, "mscale_all_dim": 0.707}},
        "DeepseekV2ForCausalLM",
    ),
    "deepseek-v2-lite": ("deepseek-v2-lite", {}, "DeepseekV2ForCausalLM"),
    "deepseek-v3": (
        "deepseek-v3-mtp",
        {"num_experts_per_tok": 4, "rope_parameters": {**YARN, **MSCALES}},
        "DeepseekV3ForCausalLM",
    ),
    "deepseek-v3-pairs": ("deepseek-v3", {"n_routed_experts": 16}, "DeepseekV3ForCausalLM"),
    "kimi-k2": (
        "kimi-k2",
        {"n_group": 1, "topk_group": 1, "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 1.0}},
        "KimiK2ForCausalLM",
    ),
    "glm4-moe": ("glm4-moe-mtp", {"rope_parameters": PARTIAL, "n_routed_experts": 8}, "Glm4MoeForCausalLM"),
    "glm4-moe-norms": (
        "glm4-moe",
        {"rope_parameters": PARTIAL, "use_qk_norm": True, "attention_bias": False},
        "Glm4MoeForCausalLM",
    ),
    "dots1": ("dots1", {"sliding_window": None, "n_routed_experts": 8}, "Dots1ForCausalLM"),
}
LAYERS = 4  # of the decoder; files of multi-token prediction hold one more


def _released(rope: dict[str, Any]) -> zoo.Change:
    """The rotary settings where the released files have them, if the zoo has taken them from where they were."""

    def alter(tensors: zoo.Tensors, config: dict[str, Any]) -> zoo.Tensors:
        if "rope_parameters" not in config:
            config["rope_theta"] = rope["rope_theta"]
            rest = {name: value for name, value in rope.items() if name not in ("rope_theta", "rope_type")}
            config.update({"rope_scaling": {"type": "yarn", **rest}} if rope["rope_type"] == "yarn" else rest)
        return tensors

    return alter


def _wide(tensors: zoo.Tensors, _: dict[str, Any]) -> zoo.Tensors:
    """Everything in float32, what a change has added too."""
    return {name: tensor.float() for name, tensor in tensors.items()}


@torch.no_grad()
def make_model(kind: str, directory: Path) -> Path:
    """Write a model in float32, every parameter and buffer random, with the example's tokenizer."""
    import transformers

    name, changed, _ = KINDS[kind]
    known = zoo.KINDS[name]
    layers = LAYERS + name.endswith("-mtp")
    fields = {**known.fields, **changed, "num_hidden_layers": layers, "vocab_size": VOCABULARY}
    config = transformers.AutoConfig.for_model(known.model_type, **fields)
    model = getattr(transformers, known.writer)._from_config(config, dtype=torch.float32)
    randomise(model, 7)
    for number, (each, buffer) in enumerate(model.named_buffers()):
        if each.endswith("e_score_correction_bias"):
            buffer.copy_(0.4 * distinct_values(buffer.numel(), number))
    model.save_pretrained(directory)
    for change in (*known.changes, _released(fields.get("rope_parameters", {})), _wide):
        zoo.changed(directory, change)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / file, directory)
    return directory
