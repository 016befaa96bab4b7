"""Modules with Transformer Engine's parameter names and extra states, in plain torch."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from transcoder.runtime.layers import CoreAttention, HFColumnLinear, HFNorm, rms_norm


class ExtraState:
    """An empty uint8 tensor out; None or a tensor in."""

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        if state is not None and not isinstance(state, torch.Tensor):
            raise RuntimeError(f"unsupported extra state {type(state).__name__}")


class TENorm(ExtraState, HFNorm):
    """RMSNorm with an extra state."""


class TERowParallelLinear(ExtraState, RowParallelLinear):
    """Row-parallel linear layer with an extra state."""


class TELayerNormColumnParallelLinear(ExtraState, HFColumnLinear):
    """RMSNorm and column-parallel linear layer in one module."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        return super().forward(rms_norm(input_, self.layer_norm_weight, self.eps), *args, **kwargs)


def _attention(qk_norm: bool) -> ModuleSpec:
    norm = TENorm if qk_norm else IdentityOp
    parts = SelfAttentionSubmodules(
        linear_qkv=TELayerNormColumnParallelLinear, core_attention=CoreAttention, linear_proj=TERowParallelLinear,
        q_layernorm=norm, k_layernorm=norm,
    )  # fmt: skip
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=parts)


def te_layers(config: Any) -> TransformerBlockSubmodules:
    """The layers of this stage, as Transformer Engine's spec names them."""
    mlp = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    parts = TransformerLayerSubmodules(
        self_attention=_attention(config.qk_layernorm), self_attn_bda=get_bias_dropout_add,
        mlp=ModuleSpec(module=MLP, submodules=mlp), mlp_bda=get_bias_dropout_add,
    )  # fmt: skip
    layer = ModuleSpec(module=TransformerLayer, submodules=parts)
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), TENorm)
