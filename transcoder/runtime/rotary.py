"""Rotary frequencies and their factor from a parsed config.json, and the modules that turn positions into angles."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import MultimodalRotaryEmbedding, RotaryEmbedding

from transcoder.errors import Problem, refuse
from transcoder.hfconfig import normalise
from transcoder.runtime.fields import Fields, fields_of, is_megatron, unsupported
from transcoder.runtime.switches import SLIDING, translated

ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the frequencies of all others change with the length
FULL = "full_attention"  # whose settings stand beside those of `sliding_attention`
PLAIN = {"architectures": ["LlamaForCausalLM"]}  # settings alone, without a class, mean the same in any


def _fields(config: dict[str, Any]) -> Fields:
    return fields_of(config if is_megatron(config) else PLAIN | config, whole=False)


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling of the rotary settings: always with `rope_type` and `rope_theta`. Raises InputError."""
    fields = _fields(config)
    raw = _stored(fields) if is_megatron(config) else _spelled(normalise(config))
    raw = dict(raw.get(FULL) or raw)
    kind = raw.pop("type", None) or "default"
    if raw.get("rope_type") in (None, "mrope"):
        raw["rope_type"] = kind
    if raw["rope_type"] == "mrope":  # positions with three rows say nothing about frequencies
        raw["rope_type"] = "default"
    return _known(raw | {"rope_theta": float(fields["rotary_base"])})


def _known(rope: dict[str, Any]) -> dict[str, Any]:
    if rope["rope_type"] not in ROPE_TYPES:
        problem = Problem(file="config.json", expected=", ".join(ROPE_TYPES), found=f"rope_type {rope['rope_type']!r}")
        raise refuse("rope", "the runtime does not know this rotary embedding", [problem])
    return rope


def _spelled(values: dict[str, Any]) -> dict[str, Any]:
    return dict(values.get("rope_parameters") or values.get("rope_scaling") or {})


def _stored(fields: Fields) -> dict[str, Any]:
    """The settings that fields of Megatron's mean."""
    if fields.get("rope_scaling"):
        fixed = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
        return {"rope_type": "llama3", "factor": fields.get("rope_scaling_factor") or 8.0, **fixed}
    if factor := fields.get("seq_len_interpolation_factor"):
        return {"rope_type": "linear", "factor": factor}
    names = ("original_max_position_embeddings", "beta_fast", "beta_slow")
    if fields.get("rope_type") == "yarn":  # of latent attention
        found = {name: fields[name] for name in (*names, "mscale", "mscale_all_dim") if name in fields}
        return {"rope_type": "yarn", "factor": fields["rotary_scaling_factor"], **found}
    if fields["position_embedding_type"] != "yarn":
        return {}
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
    return _frequencies(rope_settings(config), _fields(config))


def local_rotary(config: dict[str, Any]) -> Any:
    """Inverse frequencies of layers with windows, where these have their own; else None."""
    fields = _fields(config)
    base = (fields | translated(fields)).get("local_rotary_base")
    if not base:
        return None
    given = _spelled(normalise(config)).get(SLIDING) or {}
    inv_freq, factor = _frequencies(_known({"rope_type": "default"} | given | {"rope_theta": float(base)}), fields)
    if factor != 1.0:
        raise unsupported(f"a factor of {factor} on the rotation of layers with windows", "none")
    return inv_freq


def _frequencies(rope: dict[str, Any], fields: Fields) -> tuple[Any, float]:
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


class TwoRotations(Rotary):
    """Angles [2, positions, batch or 1, 1, head size]: of layers that see all tokens, of those with windows."""

    def __init__(self, inv_freq: Any, local: Any) -> None:
        super().__init__(inv_freq)
        self.local = Rotary(local)

    def forward(self, *positional: Any, **named: Any) -> Any:
        """Both kinds, at the same positions."""
        self.local.positions = self.positions
        return torch.stack((super().forward(*positional, **named), self.local.forward(*positional, **named)))


class MultimodalRotary(MultimodalRotaryEmbedding):  # type: ignore[misc]
    """Angles of positions with three rows (time, height, width), from given float32 frequencies."""

    def __init__(self, inv_freq: Any) -> None:
        super().__init__(2 * inv_freq.numel(), 1.0)
        self.inv_freq = inv_freq
