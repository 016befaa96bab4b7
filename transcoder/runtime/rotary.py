"""Rotary frequencies and their factor from a parsed config.json, and the modules that turn positions into angles."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding

from transcoder.errors import Problem, refuse
from transcoder.hfconfig import normalise
from transcoder.runtime.fields import Fields, fields_of, is_megatron

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the frequencies of all others change with the length
PLAIN = {"architectures": ["LlamaForCausalLM"]}  # settings alone, without a class, mean the same in any


def _fields(config: dict[str, Any]) -> Fields:
    return fields_of(config if is_megatron(config) else PLAIN | config, whole=False)


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling of the rotary settings: always with `rope_type` and `rope_theta`. Raises InputError."""
    fields = _fields(config)
    raw = _stored(fields) if is_megatron(config) else _spelled(normalise(config))
    kind = raw.pop("type", None) or "default"
    if raw.get("rope_type") in (None, "mrope"):
        raw["rope_type"] = kind
    if raw["rope_type"] == "mrope":  # positions with three rows say nothing about frequencies
        raw["rope_type"] = "default"
    raw["rope_theta"] = float(fields["rotary_base"])
    if raw["rope_type"] not in ROPE_TYPES:
        problem = Problem(file="config.json", expected=", ".join(ROPE_TYPES), found=f"rope_type {raw['rope_type']!r}")
        raise refuse("rope", "the runtime does not know this rotary embedding", [problem])
    return raw


def _spelled(values: dict[str, Any]) -> dict[str, Any]:
    return dict(values.get("rope_parameters") or values.get("rope_scaling") or {})


def _stored(fields: Fields) -> dict[str, Any]:
    """The settings that fields of Megatron's mean."""
    if fields.get("rope_scaling"):
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return {"rope_type": "llama3", "factor": fields.get("rope_scaling_factor") or 8.0, **fixed}
    if factor := fields.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": factor}
    if fields["position_embedding_type"] != "yarn":
        return {}
    names = ("original_max_position_embeddings", "beta_fast", "beta_slow")
    found = {name: fields[f"yarn_{name}"] for name in names if f"yarn_{name}" in fields}
    whole = fields.get("yarn_correction_range_round_to_int", True)
    return {"rope_type": "yarn", "factor": fields["yarn_rotary_scaling_factor"], "truncate": whole, **found}


def _scaled_rope(size: int, length: int, rope: dict[str, Any]) -> tuple[Any, float]:
    """Frequencies and factor as transformers computes them; they depend on a few fields that every family has."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    spelled = LlamaConfig(head_dim=size, max_position_embeddings=length)
    rope = rope | {"partial_rotary_factor": 1.0}  # of the size that is left
    spelled.rope_theta, spelled.rope_scaling, spelled.rope_parameters = rope["rope_theta"], rope, rope
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](spelled, "cpu")
    return inv_freq.float(), float(factor)


def rotary(config: dict[str, Any]) -> tuple[Any, float]:
    """Inverse frequencies (float32) and the factor on cos and sin."""
    rope, fields = rope_settings(config), _fields(config)
    head = fields.get("qk_pos_emb_head_dim") or fields["kv_channels"]
    size = head if "qk_pos_emb_head_dim" in fields else int(head * fields.get("rotary_percent", 1.0))
    if rope["rope_type"] != "default":
        return _scaled_rope(size, fields["seq_length"], rope)
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
