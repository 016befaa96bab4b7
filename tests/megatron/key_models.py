"""Models of Hugging Face configs, built by megatron-core's own specs for Transformer Engine.

Every TransformerConfig is written by hand from megatron-core's documentation of its fields, not from the recipes.
`providers.install` comes first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.fusions.fused_bias_geglu import quick_gelu
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.experimental_attention_variant_module_specs import (
    get_transformer_block_with_experimental_attention_variant_spec,
)
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec
from megatron.core.models.mamba import MambaModel
from megatron.core.models.mamba.mamba_layer_specs import mamba_stack_spec
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from torch.nn.functional import silu

from transcoder.mesh import Mesh

Config = dict[str, Any]
PREDICTED = "layers for multi-token prediction"  # an entry of ours: transformers drops the layers and keeps its field

# What says nothing about keys or shapes: no fusion, no random numbers, bfloat16.
CONSTANT: Config = {
    "use_cpu_initialization": True, "perform_initialization": False, "bf16": True, "params_dtype": torch.bfloat16,
    "pipeline_dtype": torch.bfloat16, "hidden_dropout": 0.0, "attention_dropout": 0.0, "bias_dropout_fusion": False,
    "bias_activation_fusion": False, "masked_softmax_fusion": False, "moe_token_dispatcher_type": "allgather",
    "moe_grouped_gemm": True, "transformer_impl": "transformer_engine",
}  # fmt: skip


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """relu(x)²"""
    return torch.relu(x).square()


def _theta(config: Config) -> float:
    return float(config.get("rope_theta") or config["rope_parameters"]["rope_theta"])


def _dense(config: Config) -> Config:
    """Grouped-query attention and a gated feed-forward without biases."""
    heads = config["num_attention_heads"]
    return {
        "num_layers": config["num_hidden_layers"],
        "hidden_size": config["hidden_size"],
        "ffn_hidden_size": config["intermediate_size"],
        "num_attention_heads": heads,
        "num_query_groups": config["num_key_value_heads"],
        "kv_channels": config.get("head_dim") or config["hidden_size"] // heads,
        "normalization": "RMSNorm",
        "layernorm_epsilon": config["rms_norm_eps"],
        "gated_linear_unit": True,
        "activation_func": silu,
        "add_bias_linear": False,
    }


def _mixture(config: Config) -> Config:
    """Experts of their own size, and their number by any of its three names."""
    names = ("n_routed_experts", "num_experts", "num_local_experts")
    return {
        "num_moe_experts": next(config[name] for name in names if name in config),
        "moe_ffn_hidden_size": config.get("moe_intermediate_size") or config["intermediate_size"],
        "moe_router_topk": config["num_experts_per_tok"],
        "moe_layer_freq": 1,
    }


def _first_dense(config: Config) -> Config:
    """The experts of DeepSeek and GLM: shared ones beside them, the first layers dense."""
    dense, layers = config["first_k_dense_replace"], config["num_hidden_layers"]
    shared = config["n_shared_experts"] * config["moe_intermediate_size"]
    return _mixture(config) | {
        "moe_router_dtype": "fp32",  # transformers multiplies the router's weights in float32
        "moe_shared_expert_intermediate_size": shared,
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
        "moe_layer_freq": [0] * dense + [1] * (layers - dense) if dense else 1,
    }


def _sigmoid(config: Config) -> Config:
    """A router with a bias for the choice of experts, and groups of them."""
    return {
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
        "moe_router_num_groups": config["n_group"],
        "moe_router_group_topk": config["topk_group"],
    }


def _mtp(config: Config) -> Config:
    return {"mtp_num_layers": config[PREDICTED] or None}


def _latent(config: Config) -> Config:
    """Multi-latent attention: its norms come with `qk_layernorm`."""
    return {
        "multi_latent_attention": True,
        "qk_layernorm": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": config["kv_lora_rank"],
        "qk_head_dim": config["qk_nope_head_dim"],
        "qk_pos_emb_head_dim": config["qk_rope_head_dim"],
        "v_head_dim": config["v_head_dim"],
        "rotary_base": _theta(config),
        "rope_type": "rope",
        "rotary_scaling_factor": 1.0,
    }


def _deepseek_v2(config: Config) -> Config:
    """Probabilities over all experts, never made to add up to one."""
    grouped = config["topk_method"] == "group_limited_greedy"
    groups = {"moe_router_num_groups": config["n_group"], "moe_router_group_topk": config["topk_group"]}
    extra = {"moe_router_pre_softmax": True} | (groups if grouped else {})
    return _dense(config) | _latent(config) | _first_dense(config) | extra


def _deepseek_v3(config: Config) -> Config:
    return _dense(config) | _latent(config) | _first_dense(config) | _sigmoid(config) | _mtp(config)


def _glm4_moe(config: Config) -> Config:
    extra = {"add_qkv_bias": config["attention_bias"], "qk_layernorm": config["use_qk_norm"]}
    return _dense(config) | _first_dense(config) | _sigmoid(config) | _mtp(config) | extra


def _dots1(config: Config) -> Config:
    return _dense(config) | _first_dense(config) | _sigmoid(config) | {"qk_layernorm": True}


def _gpt_oss(config: Config) -> Config:
    """Biases everywhere, sinks, a window in every second layer."""
    window = {"window_size": (config["sliding_window"] - 1, 0), "window_attn_skip_freq": 2}
    activation = {"activation_func": quick_gelu, "glu_linear_offset": 1.0, "activation_func_clamp_value": 7.0}
    bias = {"add_bias_linear": True, "add_qkv_bias": True, "softmax_type": "learnable"}
    return _dense(config) | _mixture(config) | window | activation | bias


def _linear_layers(config: Config) -> list[int] | int:
    """Which layers have Gated DeltaNet: one by one, or all but every n-th."""
    types = config.get("layer_types")
    return [int(name == "linear_attention") for name in types] if types else config["full_attention_interval"]


def _qwen3_next(config: Config) -> Config:
    """Gated DeltaNet in three of four layers, gated attention in the fourth."""
    sizes = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
    linear = {f"linear_{name}": config[f"linear_{name}"] for name in sizes}
    attention = {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": _linear_layers(config),
        "attention_output_gate": True,
        "qk_layernorm": True,
        "layernorm_zero_centered_gamma": True,
    }
    shared = {
        "moe_shared_expert_intermediate_size": config["shared_expert_intermediate_size"],
        "moe_shared_expert_gate": True,
    }
    return _dense(config) | _mixture(config) | linear | attention | shared | _mtp(config)


def _qwen3_moe(config: Config) -> Config:
    return (
        _dense(config)
        | _mixture(config)
        | {"qk_layernorm": True, "moe_router_pre_softmax": not config["norm_topk_prob"]}
    )


def _nemotron_h(config: Config) -> Config:
    """Mamba, attention, feed-forward and experts, one of them a layer."""
    mamba = {
        "is_hybrid_model": True,
        "mamba_state_dim": config["ssm_state_size"],
        "mamba_head_dim": config["mamba_head_dim"],
        "mamba_num_groups": config["n_groups"],
        "mamba_num_heads": config["mamba_num_heads"],
        "gated_linear_unit": False,
        "activation_func": squared_relu,
    }
    if "E" not in config["hybrid_override_pattern"]:
        return _dense(config) | mamba
    shared = {
        "moe_shared_expert_intermediate_size": config["moe_shared_expert_intermediate_size"],
        "moe_router_topk_scaling_factor": config["routed_scaling_factor"],
    }
    return _dense(config) | _mixture(config) | _sigmoid(config) | shared | mamba


FIELDS: dict[str, Callable[[Config], Config]] = {
    "deepseek_v2": _deepseek_v2, "deepseek_v3": _deepseek_v3, "kimi_k2": _deepseek_v3, "glm4_moe": _glm4_moe,
    "dots1": _dots1, "gpt_oss": _gpt_oss, "qwen3_next": _qwen3_next, "nemotron_h": _nemotron_h, "qwen3_moe": _qwen3_moe,
}  # fmt: skip


def transformer_config(config: Config, mesh: Mesh) -> Any:
    """megatron-core's configuration at a grid."""
    fields = FIELDS[config["model_type"]](config)
    parallel = {
        "tensor_model_parallel_size": mesh.tp,
        "expert_model_parallel_size": mesh.ep,
        "expert_tensor_parallel_size": mesh.etp,
    }
    kind = MLATransformerConfig if fields.get("multi_latent_attention") else TransformerConfig
    return kind(**CONSTANT, **fields, **parallel)


def outer_fields(config: Config) -> Config:
    """What a model takes beside its TransformerConfig."""
    fields = {
        "vocab_size": config["vocab_size"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
        "seq_length": config["max_position_embeddings"],
        "position_embedding_type": {"gpt_oss": "yarn", "nemotron_h": "none"}.get(config["model_type"], "rope"),
    }
    if config["model_type"] == "nemotron_h":
        return fields | {"hybrid_override_pattern": config["hybrid_override_pattern"]}
    return fields | {"rotary_base": _theta(config)}


def build(config: Config, mesh: Mesh, rows: int) -> Any:
    """The whole model of this rank, parameters unset. rows: of the embedding, padding included."""
    mcore = transformer_config(config, mesh)
    common = {
        "vocab_size": rows,
        "max_sequence_length": config["max_position_embeddings"],
        "share_embeddings_and_output_weights": config["tie_word_embeddings"],
    }
    if config["model_type"] == "nemotron_h":
        pattern = config["hybrid_override_pattern"]
        return MambaModel(mcore, mamba_stack_spec, hybrid_override_pattern=pattern, **common)
    linear = mcore.experimental_attention_variant is not None
    spec = get_transformer_block_with_experimental_attention_variant_spec if linear else get_gpt_decoder_block_spec
    layers = spec(mcore) if linear else spec(mcore, use_transformer_engine=True)
    mtp = get_gpt_mtp_block_spec(mcore, layers, use_transformer_engine=True) if mcore.mtp_num_layers else None
    return GPTModel(mcore, layers, position_embedding_type="rope", mtp_block_spec=mtp, **common)
