"""The few layers in which a megatron-core model must differ from stock to match Hugging Face."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    reduce_from_tensor_model_parallel_region,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn import functional


def visible_mask(queries: int, keys: int, left: int | None, device: Any) -> Any:
    """True where a query may look: causal, queries at the end of the keys, `left` keys back at most."""
    key = torch.arange(keys, device=device)
    query = torch.arange(keys - queries, keys, device=device)[:, None]
    visible = key <= query
    return visible if left is None else visible & (key >= query - left)


def _narrow(_module: Any, inputs: Any) -> Any:
    """Queries and keys in the type of the values, before they are cached."""
    query, key, value, *rest = inputs
    return (query.to(value.dtype), key.to(value.dtype), value, *rest)


class CoreAttention(torch.nn.Module):  # type: ignore[misc]
    """Causal attention on torch's SDPA, with grouped keys and a sliding window."""

    def __init__(self, config: Any, layer_number: int, *_args: Any, softmax_scale: Any = None, **_kwargs: Any) -> None:
        super().__init__()
        windowed = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        self.left: int | None = config.window_size[0] if windowed else None
        self.scale = softmax_scale
        if config.wide_rotation:
            self.register_forward_pre_hook(_narrow)

    def _mask(self, query: Any, key: Any) -> Any:
        """The explicit mask, or None where `is_causal` or no mask says the same."""
        queries, keys = query.shape[0], key.shape[0]
        if self.left is None and queries in (1, keys):
            return None
        return visible_mask(queries, keys, self.left, query.device)

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any = None, **_kwargs: Any) -> Any:
        """[s, b, heads, d] -> [s, b, heads * d]; megatron masks (True = hidden) are taken into account."""
        mask = self._mask(query, key)
        if attention_mask is not None:
            visible = visible_mask(query.shape[0], key.shape[0], self.left, query.device)
            mask = visible & ~attention_mask
        causal = mask is None and query.shape[0] > 1
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        out = functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, scale=self.scale, enable_gqa=True
        )
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def normalised(hidden: Any, eps: float) -> Any:
    """Hidden states in float32, of mean square 1."""
    wide = hidden.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


class HFNorm(torch.nn.Module):  # type: ignore[misc]
    """RMSNorm that rounds where Hugging Face rounds: from float32 to the model's type, before the weight."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_kwargs: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = torch.nn.Parameter(torch.empty(hidden_size, dtype=config.params_dtype))

    def forward(self, hidden: Any) -> Any:
        """The normalised hidden states."""
        return self.weighted(normalised(hidden, self.eps), self.weight, hidden.dtype)

    def weighted(self, wide: Any, weight: Any, dtype: Any) -> Any:
        """What is normalised in float32, times the weight."""
        return weight * wide.to(dtype)


class WideNorm(HFNorm):
    """RMSNorm over the heads of all tensor-parallel ranks, as in OLMoE; every rank has the whole weight."""

    def forward(self, hidden: Any) -> Any:
        """[s, b, heads of this rank, d], normalised over the last two axes of all ranks together."""
        wide, width = hidden.float(), self.weight.numel()
        size, rank = mpu.get_tensor_model_parallel_world_size(), mpu.get_tensor_model_parallel_rank()
        width_here = hidden.shape[2] * hidden.shape[3]
        copies = size * width_here // width  # ranks with the same heads, when there are fewer groups than ranks
        total = wide.pow(2).flatten(2).sum(-1)[..., None, None]
        if size > 1:  # every rank's result depends on the sum: its gradient is the sum of theirs
            total = reduce_from_tensor_model_parallel_region(total.contiguous())
            total = copy_to_tensor_model_parallel_region(total)
        wide = wide * torch.rsqrt(total / (copies * width) + self.eps)
        start = rank // copies * width_here
        weight = self.weight[start : start + width_here].view(hidden.shape[2:])
        return self.weighted(wide, weight, hidden.dtype)


class WideQueryNorm(WideNorm):
    """The norm over all query heads."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_kwargs: Any) -> None:
        super().__init__(config, config.num_attention_heads * hidden_size, eps)


class WideKeyNorm(WideNorm):
    """The norm over all key heads."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **_kwargs: Any) -> None:
        super().__init__(config, config.num_query_groups * hidden_size, eps)


class HFRouter(TopKRouter):  # type: ignore[misc]
    """The router without Transformer Engine: logits in the model's type, everything after them in float32."""

    def gating(self, input: Any) -> Any:
        """Logits of the experts."""
        return functional.linear(input, self.weight, getattr(self, "bias", None)).float()


class HFColumnLinear(ColumnParallelLinear):  # type: ignore[misc]
    """Column-parallel linear layer that rounds once, after the bias."""

    def _forward_impl(
        self, input: Any, weight: Any, *_args: Any, bias: Any = None, allreduce_dgrad: bool = False, **_kwargs: Any
    ) -> Any:
        """x W' + b in one step; the input's gradient is the sum over the ranks, which have different columns of W'."""
        if allreduce_dgrad and torch.is_grad_enabled():
            input = copy_to_tensor_model_parallel_region(input, group=self.tp_group)
        return functional.linear(input, weight, bias)
