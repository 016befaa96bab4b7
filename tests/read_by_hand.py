"""megatron-core's configuration of the zoo's kinds, read off each config.json by hand and never off the recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import zoo
from megatron.core import activations
from torch.nn.functional import silu

Config = dict[str, Any]


def config_of(kind: str) -> Config:
    """config.json of a kind; the zoo's Qwen2.5-VL has more angles than its heads have room for."""
    config = zoo.read_config(zoo.made(kind))
    if kind == "qwen2.5-vl":
        config["text_config"]["rope_parameters"]["mrope_section"] = [1, 1, 1]
    return config


def text_of(config: Config) -> Config:
    """The part of a config that is about text."""
    return {**config, **config.get("text_config", {})}


def theta_of(config: Config) -> float:
    """The base of the rotation of full attention, as either release spells it."""
    rope = config.get("rope_parameters") or {}
    return float(config.get("rope_theta") or rope.get("rope_theta") or rope["full_attention"]["rope_theta"])


def dense(c: Config) -> Config:
    """Grouped-query attention and a gated feed-forward, without biases."""
    return {
        "num_layers": c["num_hidden_layers"],
        "hidden_size": c["hidden_size"],
        "ffn_hidden_size": c["intermediate_size"],
        "num_attention_heads": c["num_attention_heads"],
        "num_query_groups": c["num_key_value_heads"],
        "kv_channels": c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"],
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "layernorm_zero_centered_gamma": False,
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
        "add_qkv_bias": False,
        "qk_layernorm": False,
        "wide_qk_norm": False,
        "softmax_scale": None,
        "softmax_type": "vanilla",
        "window_size": None,
        "num_moe_experts": None,
        "mrope_section": None,
        "multi_latent_attention": False,
        "mtp_num_layers": None,
    }


def experts(c: Config, count: str = "num_experts", size: str = "moe_intermediate_size") -> Config:
    """Experts in every layer; a softmax over those that are chosen, as where their weights are made to add up."""
    return {
        "num_moe_experts": c.get(count) or c["num_local_experts"],
        "moe_ffn_hidden_size": c[size],
        "moe_layer_freq": 1,
        "moe_router_topk": c["num_experts_per_tok"],
        "moe_router_pre_softmax": False,
        "moe_router_score_function": "softmax",
        "moe_router_enable_expert_bias": False,
        "moe_shared_expert_intermediate_size": None,
    }


def windowed(c: Config, layers: list[int]) -> Config:
    """A window of tokens before the one that asks; 1 for each layer that has it."""
    return {"window_size": (c["sliding_window"] - 1, 0), "window_attn_skip_freq": layers}


def shared(size: int, layers: Any) -> Config:
    """A shared expert, and which layers have experts."""
    return {"moe_shared_expert_intermediate_size": size, "moe_layer_freq": layers}


def deepseek(c: Config) -> Config:
    """A sigmoid router with groups, shared experts, and dense layers first."""
    scores = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}
    dense_first = [int(i >= c["first_k_dense_replace"]) for i in range(c["num_hidden_layers"])]
    beside = shared(c["n_shared_experts"] * c["moe_intermediate_size"], dense_first)
    return experts(c, "n_routed_experts") | beside | scores


def groups(c: Config) -> Config:
    """Of experts, and the factor on what they give."""
    return {
        "moe_router_num_groups": c["n_group"],
        "moe_router_group_topk": c["topk_group"],
        "moe_router_topk_scaling_factor": c["routed_scaling_factor"],
    }


def latent(c: Config) -> Config:
    """Multi-latent attention."""
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": c["q_lora_rank"],
        "kv_lora_rank": 34,
        "qk_head_dim": 10,
        "qk_pos_emb_head_dim": 4,
        "v_head_dim": 6,
        "kv_channels": 6,
        "rope_type": "rope",
        "rotary_base": theta_of(c),
        "rotary_scaling_factor": 1.0,
    }


V2_ROUTER = {
    "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "moe_router_pre_softmax": True,
}  # fmt: skip
GEMMA = {"layernorm_zero_centered_gamma": True, "activation_func": activations.fast_gelu}
GPT_OSS = {
    "add_bias_linear": True, "add_qkv_bias": True, "softmax_type": "learnable", "window_size": (7, 0),
    "window_attn_skip_freq": 2, "activation_func": activations.quick_gelu, "activation_func_clamp_value": 7.0,
    "glu_linear_offset": 1.0,
}  # fmt: skip
DELTA_NET = {
    "experimental_attention_variant": "gated_delta_net", "attention_output_gate": True, "qk_layernorm": True,
    "layernorm_zero_centered_gamma": True, "linear_conv_kernel_dim": 4, "linear_key_head_dim": 6,
    "linear_value_head_dim": 9, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "moe_shared_expert_gate": True,
}  # fmt: skip
MAMBA = {
    "is_hybrid_model": True, "gated_linear_unit": False, "activation_func": activations.squared_relu,
    "mamba_num_heads": 6, "mamba_head_dim": 12, "mamba_num_groups": 2, "mamba_state_dim": 14,
}  # fmt: skip
MAMBA_EXPERTS = {
    "num_moe_experts": 4, "moe_ffn_hidden_size": 72, "moe_router_topk": 2, "moe_router_score_function": "sigmoid",
    "moe_router_enable_expert_bias": True, "moe_shared_expert_intermediate_size": 50,
    "moe_router_topk_scaling_factor": 2.5,
}  # fmt: skip
EXPECTED: dict[str, Callable[[Config], Config]] = {
    "llama": dense,
    "llama-tied": dense,
    "llama-bias": lambda c: dense(c) | {"add_bias_linear": True, "add_qkv_bias": True},
    "mistral": lambda c: dense(c) | windowed(c, [1, 1, 1]),
    "qwen2": lambda c: dense(c) | {"add_qkv_bias": True},
    "qwen3": lambda c: dense(c) | {"qk_layernorm": True},
    "qwen3-moe": lambda c: dense(c) | experts(c) | {"qk_layernorm": True},
    "qwen3-moe-mixed": lambda c: dense(c) | experts(c) | {"qk_layernorm": True, "moe_layer_freq": [1, 0, 1]},
    "mixtral": lambda c: dense(c) | experts(c, "num_local_experts", "intermediate_size"),
    "qwen2-moe": lambda c: dense(c) | experts(c) | shared(50, 1)
    | {"add_qkv_bias": True, "moe_shared_expert_gate": True},
    "olmoe": lambda c: dense(c) | experts(c, size="intermediate_size")
    | {"qk_layernorm": True, "wide_qk_norm": True, "moe_router_pre_softmax": True},
    "qwen2.5-vl": lambda c: dense(c) | {"add_qkv_bias": True, "mrope_section": [1, 1, 1]},
    "deepseek-v2": lambda c: dense(c) | deepseek(c) | groups(c) | latent(c) | V2_ROUTER,
    "deepseek-v2-lite": lambda c: dense(c) | deepseek(c) | latent(c) | V2_ROUTER | {"moe_router_num_groups": None},
    "deepseek-v3": lambda c: dense(c) | deepseek(c) | groups(c) | latent(c),
    "kimi-k2": lambda c: dense(c) | deepseek(c) | groups(c) | latent(c),
    "gpt-oss": lambda c: dense(c) | experts(c, "num_local_experts", "intermediate_size") | GPT_OSS,
    "gemma2": lambda c: dense(c) | GEMMA | windowed(c, [1, 0, 1]) | {"softmax_scale": 256**-0.5},
    "gemma3-vl": lambda c: dense(c) | GEMMA
    | {"qk_layernorm": True, "softmax_scale": 256**-0.5, "window_size": (4095, 0)},
    "gemma3": lambda c: dense(c) | GEMMA | {"qk_layernorm": True, "softmax_scale": 256**-0.5, "window_size": (4095, 0)},
    "glm4-moe": lambda c: dense(c) | deepseek(c) | {"add_qkv_bias": True, "qk_layernorm": True},
    "dots1": lambda c: dense(c) | deepseek(c) | groups(c) | {"qk_layernorm": True},
    "phi3": dense,
    "olmo2": lambda c: dense(c) | {"qk_layernorm": True, "wide_qk_norm": True},
    "olmo3": lambda c: dense(c) | windowed(c, [1, 1, 1]) | {"qk_layernorm": True, "wide_qk_norm": True},
    "granite": lambda c: dense(c) | {"softmax_scale": 1.0},
    "qwen3-vl": lambda c: dense(c) | {"qk_layernorm": True, "mrope_section": [1, 1, 2]},
    "qwen3-vl-moe": lambda c: dense(c) | experts(c) | {"qk_layernorm": True, "mrope_section": [1, 1, 2]},
    "qwen3-next": lambda c: dense(c) | experts(c) | shared(30, 1) | DELTA_NET | {"linear_attention_freq": [1, 1, 1, 0]},
    "nemotron-h": lambda c: dense(c) | MAMBA,
    "nemotron-h-moe": lambda c: dense(c) | MAMBA | MAMBA_EXPERTS,
}  # fmt: skip
