"""megatron-core's local layer spec with our layers in it; what its versions spell differently is here alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from transcoder.runtime.layers import CoreAttention, HFColumnLinear, HFNorm, HFRouter, WideKeyNorm, WideQueryNorm


def stage_layers(config: Any, layer: Callable[[bool], Any], norm: Any) -> Any:
    """The layers of this pipeline stage; layer: the spec of a layer, with experts or without; norm: the last one."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [config.num_moe_experts is not None] * config.num_layers
    kinds = {bool(kind): layer(bool(kind)) for kind in pattern}
    first = get_transformer_layer_offset(config)
    stage = pattern[first : first + get_num_layers_to_build(config)]
    return TransformerBlockSubmodules([kinds[bool(kind)] for kind in stage], norm)


def _local_layer(config: Any, experts: int | None) -> Any:
    """megatron's local layer with our attention, norms, QKV layer and router."""
    layer = get_gpt_layer_local_spec(experts, qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = HFNorm
    attention = parts.self_attention.submodules
    attention.core_attention, attention.linear_qkv = CoreAttention, HFColumnLinear
    if config.qk_layernorm:
        wide = config.wide_qk_norm
        attention.q_layernorm, attention.k_layernorm = (WideQueryNorm, WideKeyNorm) if wide else (HFNorm, HFNorm)
    if experts:
        _parts_of(parts.mlp).router = HFRouter
    return layer


def _parts_of(spec: Any) -> Any:
    """The submodules of a ModuleSpec, or of the function that stands in its place from megatron-core 0.18 on."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def local_layers(config: Any) -> Any:
    """The layers of this pipeline stage."""
    return stage_layers(config, lambda sparse: _local_layer(config, config.num_moe_experts if sparse else None), HFNorm)
