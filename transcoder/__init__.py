"""Streams weights between Hugging Face safetensors and Megatron-Core distributed checkpoints."""

from __future__ import annotations

from typing import Any

from transcoder.errors import DifferenceError, InputError, OutputError, TranscoderError, UsageError

__version__ = "0.1.0"
__all__ = [
    "DifferenceError",
    "InputError",
    "OutputError",
    "TranscoderError",
    "UsageError",
    "build_model",
    "check",
    "hf2mcore",
    "inspect",
    "load",
    "mcore2hf",
    "open_checkpoint",
    "plan",
    "reshard",
    "roundtrip",
    "stream_hf",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'transcoder' has no attribute {name!r}")
    if name in ("build_model", "load"):
        return _of_runtime(name)
    from transcoder import api, reading

    return getattr(api, name, None) or getattr(reading, name)


def _of_runtime(name: str) -> Any:
    """What needs torch and megatron-core."""
    from transcoder.runtime import load, model

    return {"build_model": model.build, "load": load.load}[name]
