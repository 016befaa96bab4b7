"""The TransformerConfig of a model: its fields, and what is to be said of running alone."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import torch

from transcoder.errors import Problem, UsageError, refuse
from transcoder.formats.mcore import SILU
from transcoder.hfconfig import architecture_of, normalise
from transcoder.mesh import Mesh
from transcoder.recipe import evaluate
from transcoder.recipes import recipe_for
from transcoder.recipes.blocks import UNMATCHED
from transcoder.runtime.fields import Fields, config_class, fields_of, is_megatron, routed, unsupported
from transcoder.runtime.switches import has_switch, translated, unbuilt

# Whose logits were compared with those of transformers; the layers of others differ from those that are built here.
CLASSES = (
    "LlamaForCausalLM",
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "MixtralForCausalLM",
    "Qwen2MoeForCausalLM",
    "OlmoeForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "KimiK2ForCausalLM",
    "Glm4MoeForCausalLM",
    "Dots1ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "GptOssForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "GraniteForCausalLM",
)
ACTIVATIONS = ("torch.nn.functional", "megatron.core.activations")


def family(config: dict[str, Any]) -> str:
    """The class of a parsed config.json; empty for fields of Megatron's. Raises InputError for one never compared."""
    if is_megatron(config):
        return ""
    name = architecture_of(config)
    recipe_for(name)
    if name not in CLASSES:
        problem = Problem(file="config.json", expected=", ".join(CLASSES), found=name)
        raise refuse("architecture", "the runtime cannot build this architecture", [problem])
    return name


def model_arguments(config: dict[str, Any]) -> Fields:
    """What the model takes beside its configuration, but for what turns positions into angles, which is ours."""
    found = routed(fields_of(config)).model
    kind = found["position_embedding_type"]
    return {
        "vocab_size": found["vocab_size"],
        "max_sequence_length": found["max_sequence_length"],
        "share_embeddings_and_output_weights": found["share_embeddings_and_output_weights"],
        "position_embedding_type": "rope" if kind == "yarn" else kind,
    }


def is_multimodal(config: dict[str, Any]) -> bool:
    """Whether positions have three rows: time, height and width. Raises InputError for a class never compared."""
    family(config)
    return bool(fields_of(config, whole=False)["position_embedding_type"] == "mrope")


def _type_fields(dtype: str) -> Fields:
    """The compute type, in the three places that ask for it."""
    kind = getattr(torch, dtype)
    return {
        "params_dtype": kind,
        "pipeline_dtype": kind,
        "bf16": kind == torch.bfloat16,
        "fp16": kind == torch.float16,
    }


# How a model is run, whatever its training is to be like.
_RUNNING: Fields = {
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
    "moe_grouped_gemm": False,
    "moe_token_dispatcher_type": "allgather",
    "moe_router_load_balancing_type": "none",
    "moe_aux_loss_coeff": 0.0,
    "mtp_num_layers": None,
}


def sparse_layers(fields: Fields) -> list[int]:
    """1 for each layer with experts."""
    frequency, layers = fields.get("moe_layer_freq", 1), int(fields["num_layers"])
    if not fields.get("num_moe_experts"):
        return [0] * layers
    return frequency if isinstance(frequency, list) else [int(i % frequency == 0) for i in range(layers)]


def _grid_fields(fields: Fields, mesh: Mesh) -> Fields:
    """The grid; a model whose layers are all dense has no experts, whatever their number is."""
    found = {"tensor_model_parallel_size": mesh.tp, "pipeline_model_parallel_size": mesh.pp}
    if not any(sparse_layers(fields)):
        return found | {"num_moe_experts": None, "moe_layer_freq": 1, "moe_ffn_hidden_size": None}
    return found | {"expert_model_parallel_size": mesh.ep, "expert_tensor_parallel_size": mesh.etp}


def _spelled(fields: Fields) -> Fields:
    """Fields whose values a configuration wants otherwise: functions, and what a YAML has as a list."""
    found = translated(fields) | {"activation_func": _function(fields.get("activation_func", SILU))}
    if window := fields.get("window_size"):
        # Megatron Bridge's Gemma 3 counts the token itself
        found["window_size"] = (window - 1, 0) if isinstance(window, int) else tuple(window)
    if section := fields.get("mrope_section"):
        if 2 * sum(section) != fields["kv_channels"]:
            wanted = f"three numbers that add up to {fields['kv_channels'] // 2}"
            raise unsupported(f"mrope_section {list(section)}", wanted)
        found["mrope_section"] = list(section)
    return found


def _function(path: str) -> Any:
    module, _, name = path.rpartition(".")
    if module not in ACTIVATIONS:
        raise unsupported(f"activation_func {path}", " or ".join(ACTIVATIONS))
    return getattr(importlib.import_module(module), name)


def configured(fields: Fields, mesh: Mesh, dtype: str = "float32") -> Any:
    """The configuration that a table's fields describe, at a grid."""
    overridden = _RUNNING | _spelled(fields) | _type_fields(dtype) | _grid_fields(fields, mesh)
    return config_class(fields)(**routed(fields).config | overridden)


def transformer_config(config: dict[str, Any], mesh: Mesh, dtype: str = "float32") -> Any:
    """The TransformerConfig of a parsed config.json. Raises InputError for what megatron-core has no place for."""
    fields = fields_of(config)
    found = configured(fields, mesh, dtype)
    if family(config):
        _check_values(config, fields, found)
    return found


def _check_values(config: dict[str, Any], fields: Fields, found: Any) -> None:
    recipe = recipe_for(architecture_of(config))
    values = normalise(config, recipe.defaults)
    for test, reason in recipe.checks.items():
        if UNMATCHED in reason and not has_switch(reason) and evaluate(test, values):
            raise unsupported(reason, "a config without it")
    if other := unbuilt(values, found):
        raise unsupported(other, "what the layers here do")
    if "activation_func" not in fields and values.get("hidden_act") not in (None, "silu"):
        raise unsupported(f"hidden_act {values['hidden_act']!r}", "silu")


def _limits(fields: Fields) -> Iterator[tuple[str, str, int]]:
    """(mesh, name, count) for what a mesh must divide."""
    yield "tp", "attention heads", int(fields["num_attention_heads"])
    if fields.get("multi_latent_attention"):  # megatron-core cuts the down-projections and gathers what they give
        yield "tp", "rows of the compressed query", int(fields["q_lora_rank"] or 0)
        yield "tp", "rows of the latent", int(fields["kv_lora_rank"]) + int(fields["qk_pos_emb_head_dim"])
    sparse = sparse_layers(fields)
    if not all(sparse):
        yield "tp", "rows of the feed-forward", int(fields["ffn_hidden_size"])
    if any(sparse):
        yield "ep", "experts", int(fields["num_moe_experts"])
        yield "etp", "rows of an expert", int(fields["moe_ffn_hidden_size"])
        yield "tp", "rows of the shared expert", int(fields.get("moe_shared_expert_intermediate_size") or 0)
    yield "pp", "layers", int(fields["num_layers"])


def check_grid(config: dict[str, Any], mesh: Mesh, processes: int) -> None:
    """Raise UsageError for a grid that does not divide the model, or that the processes cannot form."""
    family(config)
    fields = fields_of(config)
    mesh.check_positive()
    mesh.check(_limits(fields), int(fields["num_layers"]))
    if mesh.etp > 1 and fields.get("add_bias_linear") and any(sparse_layers(fields)):
        raise UsageError(f"--etp {mesh.etp}: experts with biases are not cut; leave it at 1", kind="mesh")
    groups = int(fields["num_query_groups"])
    if groups % mesh.tp and mesh.tp % groups:
        message = f"--tp {mesh.tp} and the {groups} query groups do not divide one another"
        raise UsageError(message, kind="mesh")
    if processes % (mesh.tp * mesh.pp) or processes % (mesh.ep * mesh.etp * mesh.pp):
        message = f"this grid needs {mesh.world} processes or a multiple, there are {processes}"
        raise UsageError(f"{message}; start with torchrun --nproc-per-node {mesh.world}", kind="mesh")
