"""megatron-core's local layer spec with our layers in it; what its versions spell differently is here alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.transformer import multi_latent_attention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

from transcoder.runtime.attention import TurnedAttention, core_of
from transcoder.runtime.joining import Join, joins, plain_activation
from transcoder.runtime.latent import LatentNorm
from transcoder.runtime.layers import HFColumnLinear, HFRouter
from transcoder.runtime.norms import head_norms_of, norm_of
from transcoder.runtime.routing import WideRouter


def stage_layers(config: Any, layer: Callable[[bool], Any], norm: Any) -> Any:
    """The layers of this pipeline stage; layer: the spec of a layer, with experts or without; norm: the last one."""
    pattern = config.moe_layer_freq
    if isinstance(pattern, int):
        pattern = [config.num_moe_experts is not None] * config.num_layers
    kinds = {bool(kind): layer(bool(kind)) for kind in pattern}
    first = get_transformer_layer_offset(config)
    stage = pattern[first : first + get_num_layers_to_build(config)]
    return TransformerBlockSubmodules([kinds[bool(kind)] for kind in stage], norm)


class PlainQueries(multi_latent_attention.MLASelfAttention):  # type: ignore[misc]
    """Latent attention without a norm before the projection of queries, which megatron-core 0.19 puts there."""

    def _resolve_qk_norm_config(self, submodules: Any) -> dict[str, Any]:
        names = ("linear_q_proj", "linear_q_up_proj", "linear_kv_up_proj", "q_layernorm", "kv_layernorm")
        return {name: getattr(submodules, name) for name in names}


def _without_engine() -> None:
    """Let latent attention know that there is no Transformer Engine: 0.16 takes stand-ins of its classes for it."""
    if not isinstance(multi_latent_attention.TELinear, type):
        multi_latent_attention.HAVE_TE = False


def _local_layer(config: Any, experts: int | None) -> Any:
    """megatron's local layer with our attention, norms, QKV layer and router."""
    if latent := config.multi_latent_attention:
        _without_engine()
    layer = get_gpt_layer_local_spec(
        experts, qk_layernorm=config.qk_layernorm, multi_latent_attention=latent, normalization="RMSNorm"
    )
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm_of(config) if config.pre_norms else IdentityOp
    attention = parts.self_attention.submodules
    attention.core_attention = core_of(config)
    if latent:
        attention.q_layernorm = attention.kv_layernorm = LatentNorm
        if config.q_lora_rank is None:
            parts.self_attention.module, attention.q_layernorm = PlainQueries, IdentityOp
    else:
        attention.linear_qkv = HFColumnLinear
    if config.qk_layernorm and not latent:
        attention.q_layernorm, attention.k_layernorm = head_norms_of(config)
    if config.local_rotary_base:
        parts.self_attention.module = TurnedAttention
    if joins(config):
        _join(parts, config)
    if experts:
        _parts_of(parts.mlp).router = WideRouter if config.moe_router_dtype == "fp32" else HFRouter
    return layer


def _join(parts: Any, config: Any) -> None:
    """Our way into the residual stream; its norms are stored as Megatron Bridge does, with the layers before them."""
    parts.self_attn_bda = parts.mlp_bda = ModuleSpec(Join, params={"config": config})
    places = {"self_attn_bda": "self_attention.linear_proj", "mlp_bda": "mlp.linear_fc2"}
    renamed = {f"{name}.norm.": f"{place}.post_layernorm." for name, place in places.items()}
    parts.sharded_state_dict_keys_map = parts.sharded_state_dict_keys_map | renamed


def _parts_of(spec: Any) -> Any:
    """The submodules of a ModuleSpec, or of the function that stands in its place from megatron-core 0.18 on."""
    return spec.keywords["submodules"] if isinstance(spec, partial) else spec.submodules


def local_layers(config: Any) -> Any:
    """The layers of this pipeline stage."""
    config.activation_func = plain_activation(config.activation_func)
    norm = norm_of(config)
    return stage_layers(config, lambda sparse: _local_layer(config, config.num_moe_experts if sparse else None), norm)
