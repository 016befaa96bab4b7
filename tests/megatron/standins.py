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
from megatron.core.transformer.moe.experts import SequentialMLP, TEGroupedMLP
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch.nn import functional

from transcoder.runtime.layers import (
    CoreAttention,
    HFColumnLinear,
    HFNorm,
    HFRouter,
    WideKeyNorm,
    WideQueryNorm,
    normalised,
)
from transcoder.runtime.specs import stage_layers


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


class TEColumnParallelLinear(ExtraState, HFColumnLinear):
    """Column-parallel linear layer with an extra state."""


class TELayerNormColumnParallelLinear(ExtraState, HFColumnLinear):
    """RMSNorm and column-parallel linear layer in one module."""

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.eps = config.layernorm_epsilon
        self.layer_norm_weight = torch.nn.Parameter(torch.empty(input_size, dtype=config.params_dtype))

    def forward(self, input_: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        hidden = self.layer_norm_weight * normalised(input_, self.eps).to(input_.dtype)
        return super().forward(hidden, *args, **kwargs)


class TEGroupedLinear(ExtraState, torch.nn.Module):
    """The linear layers of all experts of a rank: `weight0`, `weight1`, … and one extra state."""

    axis = 0  # of the weight, that expert-tensor parallelism cuts

    def __init__(
        self, num_gemms: int, input_size: int, output_size: int, *, config: Any, pg_collection: Any, **_kwargs: Any
    ) -> None:
        super().__init__()
        self.groups, self.num_gemms = pg_collection, num_gemms
        shape = [output_size, input_size]
        shape[self.axis] //= pg_collection.expt_tp.size()
        for i in range(num_gemms):
            weight = torch.nn.Parameter(torch.empty(shape, dtype=config.params_dtype))
            self.register_parameter(f"weight{i}", weight)

    def forward(self, input_: torch.Tensor, splits: list[int]) -> tuple[torch.Tensor, None]:
        parts = zip(input_.split(splits), self.parameters(), strict=True)
        return torch.cat([functional.linear(part, weight) for part, weight in parts]), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """The keys of experts one by one: number in the key (singleton) or on an axis."""
        first = self.groups.ep.rank() * self.num_gemms
        found: dict[str, Any] = {}
        for i in range(self.num_gemms):
            found |= self._expert(i, first + i, prefix, sharded_offsets, metadata)
        for item in found.values():
            item.replica_id = (*item.replica_id[:2], self.groups.expt_dp.rank())
        return found

    def _expert(self, i: int, number: int, prefix: str, offsets: Any, metadata: Any) -> dict[str, Any]:
        start = prefix
        if metadata.get("singleton_local_shards"):
            start = f"{number}.{prefix}"
        else:
            offsets = (*offsets, (len(offsets), number, self.groups.ep.size() * self.num_gemms))
        state = {"weight": getattr(self, f"weight{i}"), "_extra_state": self.get_extra_state()}
        items = make_sharded_tensors_for_checkpoint(
            state, start, {"weight": self.axis}, offsets, tp_group=self.groups.expt_tp,
            dp_cp_group=metadata["dp_cp_group"],
        )  # fmt: skip
        names = f"{prefix}weight{i}", f"{prefix}_extra_state{i or ''}"
        return dict(zip(names, (items[f"{start}weight"], items[f"{start}_extra_state"]), strict=True))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for i in range(1, self.num_gemms):
            self.set_extra_state(state_dict.pop(f"{prefix}_extra_state{i}"))
        super()._load_from_state_dict(state_dict, prefix, *args)


class TEColumnParallelGroupedLinear(TEGroupedLinear):
    """Rows cut."""


class TERowParallelGroupedLinear(TEGroupedLinear):
    """Columns cut."""

    axis = 1


class TEWideQueryNorm(ExtraState, WideQueryNorm):
    """RMSNorm over all query heads, with an extra state."""


class TEWideKeyNorm(ExtraState, WideKeyNorm):
    """RMSNorm over all key heads, with an extra state."""


def _attention(config: Any) -> ModuleSpec:
    """Self-attention; norms of queries and keys over one head, over all heads, or none."""
    q_norm = TEWideQueryNorm if config.wide_qk_norm else TENorm if config.qk_layernorm else IdentityOp
    k_norm = TEWideKeyNorm if config.wide_qk_norm else TENorm if config.qk_layernorm else IdentityOp
    parts = SelfAttentionSubmodules(
        linear_qkv=TELayerNormColumnParallelLinear, core_attention=CoreAttention, linear_proj=TERowParallelLinear,
        q_layernorm=q_norm, k_layernorm=k_norm,
    )  # fmt: skip
    return ModuleSpec(module=SelfAttention, params={"attn_mask_type": AttnMaskType.causal}, submodules=parts)


def _mixture(grouped: bool) -> ModuleSpec:
    """Router, experts one by one or as one grouped layer, and the shared expert for a model that has one."""
    plain = MLPSubmodules(linear_fc1=TEColumnParallelLinear, linear_fc2=TERowParallelLinear)
    groups = MLPSubmodules(linear_fc1=TEColumnParallelGroupedLinear, linear_fc2=TERowParallelGroupedLinear)
    experts = ModuleSpec(TEGroupedMLP, submodules=groups) if grouped else ModuleSpec(SequentialMLP, submodules=plain)
    shared = ModuleSpec(SharedExpertMLP, submodules=plain)
    router = {"router": HFRouter} if hasattr(MoESubmodules, "router") else {}  # 0.15 has its own alone
    parts = MoESubmodules(experts=experts, shared_experts=shared, **router)
    return ModuleSpec(module=MoELayer, submodules=parts)


def _layer(config: Any, sparse: bool, grouped: bool) -> ModuleSpec:
    """A layer as Transformer Engine's spec has it: a norm of its own before experts, else a fused one."""
    dense = MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear)
    parts = TransformerLayerSubmodules(
        self_attention=_attention(config), self_attn_bda=get_bias_dropout_add,
        pre_mlp_layernorm=TENorm if sparse else IdentityOp,
        mlp=_mixture(grouped) if sparse else ModuleSpec(module=MLP, submodules=dense), mlp_bda=get_bias_dropout_add,
    )  # fmt: skip
    return ModuleSpec(module=TransformerLayer, submodules=parts)


def te_layers(config: Any) -> Any:
    """The layers of this stage, as Transformer Engine's spec names them; experts one by one."""
    return stage_layers(config, lambda sparse: _layer(config, sparse, grouped=False), TENorm)


def te_grouped_layers(config: Any) -> Any:
    """The same with all experts of a rank in one layer."""
    return stage_layers(config, lambda sparse: _layer(config, sparse, grouped=True), TENorm)
