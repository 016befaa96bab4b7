"""Rotary frequencies and their factor from a parsed config.json, and the modules that turn positions into angles."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding

from transcoder.errors import Problem, refuse
from transcoder.runtime.config import head_size

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the frequencies of all others change with the length


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling of the rotary settings: always with `rope_type` and `rope_theta`. Raises InputError."""
    raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = raw.pop("type", None) or "default"
    if raw.get("rope_type") in (None, "mrope"):
        raw["rope_type"] = kind
    if raw["rope_type"] == "mrope":  # positions with three rows say nothing about frequencies
        raw["rope_type"] = "default"
    raw["rope_theta"] = float(raw.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if raw["rope_type"] not in ROPE_TYPES:
        problem = Problem(file="config.json", expected=", ".join(ROPE_TYPES), found=f"rope_type {raw['rope_type']!r}")
        raise refuse("rope", "the runtime does not know this rotary embedding", [problem])
    return raw


def _scaled_rope(config: dict[str, Any], rope: dict[str, Any]) -> tuple[Any, float]:
    """Frequencies and factor as transformers computes them; they depend on a few fields that every family has."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = {name: config[name] for name in ("hidden_size", "num_attention_heads")}
    spelled = LlamaConfig(
        **shape, head_dim=head_size(config), max_position_embeddings=config.get("max_position_embeddings") or 2048
    )
    spelled.rope_theta, spelled.rope_scaling, spelled.rope_parameters = rope["rope_theta"], rope, rope
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](spelled, "cpu")
    return inv_freq.float(), float(factor)


def rotary(config: dict[str, Any]) -> tuple[Any, float]:
    """Inverse frequencies (float32) and the factor on cos and sin."""
    rope = rope_settings(config)
    if rope["rope_type"] != "default":
        return _scaled_rope(config, rope)
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


class Rotary(RotaryEmbedding):  # type: ignore[misc]
    """Angles from given float32 frequencies, at the positions set for a forward or else from 0."""

    def __init__(self, inv_freq: Any) -> None:
        super().__init__(2 * inv_freq.numel(), 1.0, use_cpu_initialization=True)
        self.inv_freq = inv_freq
        self.positions: Any = None  # [batch or 1, positions], set around a forward

    def forward(self, max_seq_len: int, offset: int = 0, *_args: Any, **_kwargs: Any) -> Any:
        """Angles [positions, batch or 1, 1, head size]."""
        positions = self.positions
        if positions is None:
            positions = torch.arange(offset, offset + max_seq_len, device=self.inv_freq.device)[None]
        angles = positions.T.to(self.inv_freq)[..., None] * self.inv_freq
        return torch.cat((angles, angles), dim=-1)[:, :, None, :]


class MultimodalRotary(MultimodalRotaryEmbedding):  # type: ignore[misc]
    """Angles of positions with three rows (time, height, width), from given float32 frequencies."""

    def __init__(self, inv_freq: Any) -> None:
        super().__init__(2 * inv_freq.numel(), 1.0)
        self.inv_freq = inv_freq
