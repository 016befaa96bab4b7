"""Attention that PyTorch's does not compute, and attention of layers that rotate in different ways."""

from __future__ import annotations

import copy
from typing import Any

import torch
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.utils import is_layer_window_attention, make_sharded_tensors_for_checkpoint

from transcoder.runtime.layers import CoreAttention, visible_mask

FACTOR = "yarn_rotary_scaling_factor"


class ScoredAttention(CoreAttention):
    """Attention whose scores are soft-capped, or that may look at nothing: each head's learnt score of that, its sink.

    The order of operations and of roundings is that of transformers.
    """

    def __init__(self, config: Any, layer_number: int, *args: Any, **options: Any) -> None:
        super().__init__(config, layer_number, *args, **options)
        self.softcap = config.attention_softcap
        heads = config.num_attention_heads // config.tensor_model_parallel_size
        sinks = torch.empty(heads, dtype=config.params_dtype) if config.softmax_type == "learnable" else None
        self.register_parameter("softmax_offset", None if sinks is None else torch.nn.Parameter(sinks))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
        """The sinks, of which every tensor-parallel rank has those of its heads."""
        state = self.state_dict(prefix="", keep_vars=True)
        return make_sharded_tensors_for_checkpoint(state, prefix, {"softmax_offset": 0}, sharded_offsets)

    def forward(self, query: Any, key: Any, value: Any, attention_mask: Any = None, **_options: Any) -> Any:
        """[s, b, heads, d] -> [s, b, heads * d]."""
        q, k, v = (tensor.permute(1, 2, 0, 3) for tensor in (query, key, value))
        k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
        scores = q @ k.transpose(2, 3) * (self.scale or q.shape[-1] ** -0.5)
        if self.softcap is not None:
            scores = torch.tanh(scores / self.softcap) * self.softcap
        visible = visible_mask(q.shape[2], k.shape[2], self.left, q.device)
        if attention_mask is not None:
            visible = visible & ~attention_mask
        out = self._weights(scores.masked_fill(~visible, torch.finfo(scores.dtype).min)) @ v
        return out.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)

    def _weights(self, scores: Any) -> Any:
        """What each key counts."""
        if self.softmax_offset is None:
            return torch.softmax(scores, dim=-1, dtype=torch.float32).to(scores.dtype)
        sinks = self.softmax_offset.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
        joined = torch.cat([scores, sinks], dim=-1)
        joined = joined - joined.max(dim=-1, keepdim=True).values
        return torch.softmax(joined, dim=-1)[..., :-1]


class TurnedAttention(SelfAttention):  # type: ignore[misc]
    """Self-attention where layers with windows rotate in their own way, without a factor."""

    def __init__(self, config: Any, *args: Any, layer_number: int, **options: Any) -> None:
        local = is_layer_window_attention(config.window_size, config.window_attn_skip_freq, layer_number)
        if local and hasattr(config, FACTOR):
            config = copy.copy(config)
            delattr(config, FACTOR)
        super().__init__(config, *args, layer_number=layer_number, **options)
        self.rotation = int(local)

    def forward(self, hidden_states: Any, *args: Any, rotary_pos_emb: Any = None, **options: Any) -> Any:
        """As ever, with this layer's angles of those of both kinds."""
        angles = None if rotary_pos_emb is None else rotary_pos_emb[self.rotation]
        return super().forward(hidden_states, *args, rotary_pos_emb=angles, **options)


def core_of(config: Any) -> Any:
    """The class of a model's core attention."""
    scored = config.attention_softcap is not None or config.softmax_type == "learnable"
    return ScoredAttention if scored else CoreAttention
