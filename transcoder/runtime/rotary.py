"""Rotary frequencies and their factor, from a parsed config.json."""

from __future__ import annotations

from typing import Any

import torch

from transcoder.runtime.config import head_size

ROPE_TYPES = ("default", "linear", "llama3", "yarn")


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling of the rotary settings: always with `rope_type` and `rope_theta`."""
    raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = raw.pop("type", None)
    raw.setdefault("rope_type", kind or "default")
    raw.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if raw["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope_type {raw['rope_type']!r} is not supported: only {', '.join(ROPE_TYPES)}")
    return raw


def _scaled_rope(config: dict[str, Any], rope: dict[str, Any]) -> tuple[Any, float]:
    """Frequencies and factor as transformers computes them."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = {
        key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling", "model_type")
    }
    spelled = AutoConfig.for_model(config["model_type"], **plain)
    spelled.rope_theta, spelled.rope_scaling, spelled.rope_parameters = rope["rope_theta"], rope, rope
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](spelled, "cpu")
    return inv_freq, float(factor)


def rotary(config: dict[str, Any]) -> tuple[Any, float]:
    """Inverse frequencies (float32) and the factor on cos and sin."""
    rope = rope_settings(config)
    if rope["rope_type"] != "default":
        return _scaled_rope(config, rope)
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0
