"""The TransformerConfig of a parsed config.json, as `transcoder.hfconfig.normalise` spells it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from transcoder.errors import Problem, UsageError, refuse
from transcoder.mesh import Mesh

DENSE = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
EXPERTS = ("Qwen3MoeForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "OlmoeForCausalLM")
VISION = ("Qwen2_5_VLForConditionalGeneration",)
CLASSES = DENSE + EXPERTS + VISION


@dataclass
class ModelConfig(TransformerConfig):  # type: ignore[misc]
    """TransformerConfig with what megatron-core has no field for."""

    wide_qk_norm: bool = False  # norms of queries and keys over all heads at once


def family(config: dict[str, Any]) -> str:
    """The supported class name of a parsed config.json. Raises InputError when it has none."""
    names = config.get("architectures") or []
    found = [name for name in names if name in CLASSES]
    if not found:
        problem = Problem(file="config.json", expected=", ".join(CLASSES), found=f"{names or config.get('model_type')}")
        raise refuse("architecture", "the runtime cannot build this architecture", [problem])
    return str(found[0])


def _unsupported(found: str, expected: str) -> Exception:
    return refuse(
        "config", "the runtime cannot build this model", [Problem("", "config.json", "", "", expected, found)]
    )


def head_size(config: dict[str, Any]) -> int:
    """The size of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _windowed_layers(config: dict[str, Any]) -> list[int]:
    """1 for each layer with a sliding window."""
    layers, name = int(config["num_hidden_layers"]), family(config)
    if not config.get("sliding_window") or name in ("LlamaForCausalLM", "OlmoeForCausalLM"):
        return [0] * layers
    if name in ("MistralForCausalLM", "MixtralForCausalLM"):
        return [1] * layers
    if not config.get("use_sliding_window"):
        return [0] * layers
    if name == "Qwen3MoeForCausalLM":
        return [1] * layers
    kinds = config.get("layer_types")
    first = config.get("max_window_layers", layers)
    return [int(kinds[i] == "sliding_attention" if kinds else i >= first) for i in range(layers)]


def _window_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The window's size and layers; nothing when no layer has one."""
    windowed = _windowed_layers(config)
    if not any(windowed):
        return {}
    return {"window_size": (int(config["sliding_window"]) - 1, 0), "window_attn_skip_freq": windowed}


def _bias_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron has one switch for all biases, and one more for QKV alone."""
    if family(config) in ("Qwen2ForCausalLM", "Qwen2MoeForCausalLM", *VISION):
        return {"add_bias_linear": False, "add_qkv_bias": bool(config.get("qkv_bias", True))}
    attention = bool(config.get("attention_bias"))
    return {"add_bias_linear": attention or bool(config.get("mlp_bias")), "add_qkv_bias": attention}


def _shape_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and the norm's epsilon."""
    if config.get("hidden_act", "silu") != "silu":
        raise _unsupported(f"hidden_act {config['hidden_act']!r}", "silu")
    return {
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": int(config["hidden_size"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "num_attention_heads": int(config["num_attention_heads"]),
        "num_query_groups": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "kv_channels": head_size(config),
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "qk_layernorm": family(config) in ("Qwen3ForCausalLM", "Qwen3MoeForCausalLM", "OlmoeForCausalLM"),
        "wide_qk_norm": family(config) == "OlmoeForCausalLM",
    }


def sparse_layers(config: dict[str, Any]) -> list[int]:
    """1 for each layer with experts."""
    if family(config) not in EXPERTS:
        return [0] * int(config["num_hidden_layers"])
    dense, step = config.get("mlp_only_layers") or (), int(config.get("decoder_sparse_step") or 1)
    return [int(i not in dense and (i + 1) % step == 0) for i in range(int(config["num_hidden_layers"]))]


def _router_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Softmax over the chosen experts where Hugging Face renormalises, else over all."""
    if config.get("clip_qkv") is not None:
        raise _unsupported(f"clip_qkv {config['clip_qkv']}", "null: megatron-core has no counterpart")
    renormalised = family(config) == "MixtralForCausalLM" or bool(config.get("norm_topk_prob"))
    return {
        "moe_router_topk": int(config["num_experts_per_tok"]),
        "moe_router_pre_softmax": not renormalised,
        "moe_router_load_balancing_type": "none",
        "moe_aux_loss_coeff": 0.0,
    }


def _shared_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The shared expert of Qwen2's mixtures."""
    if family(config) != "Qwen2MoeForCausalLM":
        return {}
    size = int(config["shared_expert_intermediate_size"])
    return {"moe_shared_expert_intermediate_size": size, "moe_shared_expert_gate": True}


def _expert_fields(config: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Number, size and place of the experts; a list of layers only where they differ, for it changes the keys."""
    sparse = sparse_layers(config)
    if not any(sparse):
        return {}
    fields = {
        "num_moe_experts": int(config.get("num_experts") or config["num_local_experts"]),
        "moe_ffn_hidden_size": int(config.get("moe_intermediate_size") or config["intermediate_size"]),
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_grouped_gemm": False,
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": mesh.ep,
        "expert_tensor_parallel_size": mesh.etp,
    }
    return fields | _router_fields(config) | _shared_fields(config)


def is_multimodal(config: dict[str, Any]) -> bool:
    """Whether positions have three rows: time, height and width."""
    return family(config) in VISION


def _position_fields(config: dict[str, Any]) -> dict[str, Any]:
    """How many frequencies belong to time, height and width."""
    if not is_multimodal(config):
        return {}
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    section = rope.get("mrope_section")
    if not section or 2 * sum(section) != head_size(config):
        raise _unsupported(f"mrope_section {section}", f"three numbers that add up to {head_size(config) // 2}")
    return {"mrope_section": list(section)}


def _type_fields(dtype: str) -> dict[str, Any]:
    """The compute type, in the three places that ask for it."""
    kind = getattr(torch, dtype)
    return {
        "params_dtype": kind,
        "pipeline_dtype": kind,
        "bf16": kind == torch.bfloat16,
        "fp16": kind == torch.float16,
    }


_CONSTANTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": torch.nn.functional.silu,
    "gated_linear_unit": True,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}


def transformer_config(config: dict[str, Any], mesh: Mesh, dtype: str = "float32") -> ModelConfig:
    """The TransformerConfig of a parsed config.json."""
    fields = _shape_fields(config) | _bias_fields(config) | _window_fields(config) | _expert_fields(config, mesh)
    fields |= _position_fields(config)
    fields |= {"tensor_model_parallel_size": mesh.tp, "pipeline_model_parallel_size": mesh.pp}
    return ModelConfig(**_CONSTANTS, **_type_fields(dtype), **fields)


def _limits(config: dict[str, Any]) -> Iterator[tuple[str, str, int]]:
    """(mesh, name, count) for what a mesh must divide."""
    yield "tp", "attention heads", int(config["num_attention_heads"])
    sparse = sparse_layers(config)
    if not all(sparse):
        yield "tp", "rows of the feed-forward", int(config["intermediate_size"])
    if any(sparse):
        yield "ep", "experts", int(config.get("num_experts") or config["num_local_experts"])
        yield "etp", "rows of an expert", int(config.get("moe_intermediate_size") or config["intermediate_size"])
    yield "pp", "layers", int(config["num_hidden_layers"])


def check_grid(config: dict[str, Any], mesh: Mesh, processes: int) -> None:
    """Raise UsageError for a grid that does not divide the model, or that the processes cannot form."""
    mesh.check_positive()
    mesh.check(_limits(config), int(config["num_hidden_layers"]))
    groups = int(config.get("num_key_value_heads") or config["num_attention_heads"])
    if groups % mesh.tp and mesh.tp % groups:
        message = f"--tp {mesh.tp} and the {groups} query groups do not divide one another"
        raise UsageError(message, kind="mesh")
    if processes % (mesh.tp * mesh.pp) or processes % (mesh.ep * mesh.etp * mesh.pp):
        message = f"this grid needs {mesh.world} processes or a multiple, there are {processes}"
        raise UsageError(f"{message}; start with torchrun --nproc-per-node {mesh.world}", kind="mesh")
