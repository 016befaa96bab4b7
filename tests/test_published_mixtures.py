"""Published mixtures of experts and Qwen2.5-VL sizes: parameter and tensor counts, from their true configurations."""

from __future__ import annotations

from math import prod
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText

from transcoder.hfconfig import architecture_of, normalise
from transcoder.planner import Model, build_model
from transcoder.recipes import recipe_for
from transcoder.sizing import axis_sizes

COMMON = {"hidden_act": "silu", "tie_word_embeddings": False, "torch_dtype": "bfloat16", "rms_norm_eps": 1e-6}
QWEN3 = {
    **COMMON, "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
    "head_dim": 128, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
    "mlp_only_layers": [],
    "decoder_sparse_step": 1, "norm_topk_prob": True, "rope_theta": 1e6, "max_position_embeddings": 40960,
}  # fmt: skip
MIXTRAL = {
    **COMMON, "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "vocab_size": 32000,
    "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
    "num_key_value_heads": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "max_position_embeddings": 32768,
}  # fmt: skip
VISION = {
    "depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "patch_size": 14,
    "spatial_merge_size": 2, "temporal_patch_size": 2, "in_channels": 3,
}  # fmt: skip
VL = {
    **COMMON, "architectures": ["Qwen2_5_VLForConditionalGeneration"], "model_type": "qwen2_5_vl",
    "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]}, "max_position_embeddings": 128000,
}  # fmt: skip


def _sizes(base: dict[str, Any], layers: int, hidden: int, ffn: int, heads: int, **more: Any) -> dict[str, Any]:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads}
    return {**base, **sizes, "intermediate_size": ffn, **more}


def _vl(layers: int, hidden: int, ffn: int, heads: int, groups: int, vocab: int, **more: Any) -> dict[str, Any]:
    vision = {**VISION, "out_hidden_size": hidden, **more.pop("vision", {})}
    return _sizes(
        VL, layers, hidden, ffn, heads, num_key_value_heads=groups, vocab_size=vocab, vision_config=vision, **more
    )


# Parameters as on the model cards' safetensors; tensors as in their index files.
PUBLISHED: dict[str, tuple[int, int, dict[str, Any]]] = {
    "Qwen3-30B-A3B": (30_532_122_624, 18_867, _sizes(QWEN3, 48, 2048, 6144, 32, moe_intermediate_size=768)),
    "Qwen3-235B-A22B": (235_093_634_560, 36_945, _sizes(QWEN3, 94, 4096, 12288, 64, moe_intermediate_size=1536)),
    "Mixtral-8x7B": (46_702_792_704, 995, MIXTRAL),
    "Qwen2.5-VL-3B": (3_754_622_976, 824, _vl(36, 2048, 11008, 16, 2, 151936, tie_word_embeddings=True)),
    "Qwen2.5-VL-7B": (8_292_166_656, 729, _vl(28, 3584, 18944, 28, 4, 152064)),
    "Qwen2.5-VL-72B": (73_410_777_344, 1353, _vl(80, 8192, 29568, 64, 8, 152064, vision={"intermediate_size": 3456})),
}


def planned(config: dict[str, Any]) -> Model:
    """Our side, in the released files' spelling."""
    recipe = recipe_for(architecture_of(config))
    values = normalise(config) | {"norm": "te", "experts": "per-expert", "prefix": "old", "tower": "a"}
    return build_model(recipe, values, axis_sizes(recipe, values, 100_000) | {"pad": 0})


def transformers_parameters(config: dict[str, Any]) -> int:
    """What transformers' own class has, without memory."""
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    if "vision_config" in fields:
        top = {name: fields.pop(name) for name in ("vision_config", "tie_word_embeddings")}
        fields = {"text_config": fields, **top}
    kind = AutoModelForImageTextToText if "vision_config" in fields else AutoModelForCausalLM
    with torch.device("meta"):
        model = kind.from_config(AutoConfig.for_model(config["model_type"], **fields))
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_counts_are_those_of_the_published_model_and_of_transformers(name: str) -> None:
    parameters, tensors, config = PUBLISHED[name]
    model = planned(config)
    assert len(model.hf) == tensors
    assert sum(prod(tensor.shape) for tensor in model.hf.values()) == parameters
    assert sum(prod(tensor.shape) for tensor in model.mcore.values()) == parameters
    assert transformers_parameters(config) == parameters
