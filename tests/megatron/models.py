"""Makes tiny random Hugging Face models, every element of every tensor different."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

# 4 groups of 3 heads of 6 make q_proj and o_proj square; TP 4 cuts 92 rows of gate into 23, the vocabulary unevenly.
BASE: dict[str, Any] = {
    "num_hidden_layers": 4, "hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 92, "vocab_size": 263, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False, "use_cache": False, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama-tied": ("llama", {"tie_word_embeddings": True, "num_key_value_heads": 12}),
    "llama-bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama-attn-bias": ("llama", {"attention_bias": True}),
    "llama-mlp-bias": ("llama", {"mlp_bias": True}),
    "llama-groups": ("llama", {"num_key_value_heads": 2}),
    "mistral": ("mistral", {"sliding_window": 5, "head_dim": 8}),
    "qwen2": ("qwen2", {"use_sliding_window": False, "intermediate_size": 72}),
    "qwen3": ("qwen3", {"head_dim": 8, "use_sliding_window": False}),
}

# Experts of 46 rows: expert-tensor parallelism of 2 cuts them into 23.
_QWEN_EXPERTS: dict[str, Any] = {
    "num_experts": 8, "num_experts_per_tok": 3, "moe_intermediate_size": 46, "decoder_sparse_step": 1,
    "mlp_only_layers": [], "use_sliding_window": False,
}  # fmt: skip
_QWEN3_MOE = {**_QWEN_EXPERTS, "head_dim": 8, "norm_topk_prob": True}

EXPERT_KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", _QWEN3_MOE),
    "qwen3-moe-mixed": ("qwen3_moe", {**_QWEN3_MOE, "mlp_only_layers": [0], "norm_topk_prob": False}),
    "qwen3-moe-step": ("qwen3_moe", {**_QWEN3_MOE, "decoder_sparse_step": 2, "tie_word_embeddings": True}),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 46, "sliding_window": 5},
    ),
    "qwen2-moe": (
        "qwen2_moe",
        {**_QWEN_EXPERTS, "num_experts": 12, "shared_expert_intermediate_size": 60, "norm_topk_prob": False},
    ),
    "olmoe": (
        "olmoe",
        {"num_experts": 8, "num_experts_per_tok": 3, "intermediate_size": 46, "norm_topk_prob": False},
    ),
}


def distinct_values(count: int, seed: int) -> torch.Tensor:
    """`count` different float32 numbers in (-1, 1), shuffled, none of them exact in bfloat16."""
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    values = ((order.double() + 0.5) * (2.0 / count) - 1.0).float()
    return (values.view(torch.int32) | 1).view(torch.float32)


def _is_norm(name: str) -> bool:
    return "norm" in name


@torch.no_grad()
def randomise(model: torch.nn.Module, seed: int) -> None:
    """Fill every parameter: norms around 1, the others around 0."""
    parameters = dict(model.named_parameters())
    values = distinct_values(sum(p.numel() for p in parameters.values()), seed)
    for name, parameter in parameters.items():
        part, values = values[: parameter.numel()], values[parameter.numel() :]
        part = 1.0 + 0.4 * part if _is_norm(name) else 0.4 * part
        part = (part.contiguous().view(torch.int32) | 1).view(torch.float32)
        parameter.copy_(part.view_as(parameter))


def make_model(kind: str, directory: Path | str, shards: int = 2, seed: int = 7, **overrides: Any) -> Path:
    """Write the model of this kind into `directory`, in at least `shards` safetensors files."""
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, deltas = {**KINDS, **EXPERT_KINDS}[kind]
    config = AutoConfig.for_model(model_type, **{**BASE, **deltas, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomise(model, seed)
    size = sum(p.numel() * 4 for p in model.parameters())
    limit = "1GB" if shards == 1 else size // shards - 1
    model.save_pretrained(directory, max_shard_size=limit)
    return Path(directory)


def read_config(directory: Path | str) -> dict[str, Any]:
    """The parsed config.json."""
    parsed: dict[str, Any] = json.loads((Path(directory) / "config.json").read_text())
    return parsed
