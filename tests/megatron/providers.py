"""Packages that megatron-core wants beside itself, in plain torch: its own spec functions then build every model.

Parameter names, shapes and extra states as in Transformer Engine 2.8, mamba_ssm and flash-linear-attention; nothing
here can run forward. `install` must come before the first import of megatron.
"""

from __future__ import annotations

import sys
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch

from transcoder.runtime.device import install_cuda_shim

VERSION = "2.8.0"  # of Transformer Engine: the first with learnable softmax offsets


class TEModule(torch.nn.Module):
    """What every module of Transformer Engine has: an extra state, empty without FP8."""

    fp8 = fp8_calibration = False

    def __init__(self) -> None:
        super().__init__()
        self.fp8_meta: dict[str, Any] = {"fp8_checkpoint": False}

    def get_extra_state(self) -> torch.Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Any) -> None:
        if state is not None and not isinstance(state, torch.Tensor):
            raise RuntimeError(f"unsupported extra state {type(state).__name__}")

    def init_fp8_metadata(self, **_kwargs: Any) -> None:
        """Nothing: there is no FP8."""

    def parameter(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> None:
        """A parameter of that name and shape, full of NaN."""
        value = torch.full(shape, float("nan"), dtype=dtype or torch.float32)
        self.register_parameter(name, torch.nn.Parameter(value))


class Linear(TEModule):
    """`weight` and `bias`; a rank's part of the rows or the columns."""

    def __init__(
        self, in_features: int, out_features: int, *, bias: bool, parallel_mode: str | None, tp_size: int,
        params_dtype: torch.dtype, **_kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.in_features = in_features // (tp_size if parallel_mode == "row" else 1)
        self.out_features = out_features // (tp_size if parallel_mode == "column" else 1)
        self.use_bias, self.parallel_mode, self.tp_size = bias, parallel_mode, tp_size
        self.parameter("weight", self.out_features, self.in_features, dtype=params_dtype)
        if bias:
            self.parameter("bias", self.out_features, dtype=params_dtype)


class LayerNormLinear(Linear):
    """A linear layer with `layer_norm_weight` before it."""

    def __init__(
        self, in_features: int, out_features: int, *, normalization: str, params_dtype: torch.dtype, **kwargs: Any
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **kwargs)
        self.parameter("layer_norm_weight", in_features, dtype=params_dtype)
        if normalization == "LayerNorm":
            self.parameter("layer_norm_bias", in_features, dtype=params_dtype)


class RMSNorm(TEModule):
    """`weight`."""

    def __init__(self, hidden_size: int, *, params_dtype: torch.dtype, **_kwargs: Any) -> None:
        super().__init__()
        self.parameter("weight", hidden_size, dtype=params_dtype)


class LayerNorm(RMSNorm):
    """`weight` and `bias`."""

    def __init__(self, hidden_size: int, *, params_dtype: torch.dtype, **kwargs: Any) -> None:
        super().__init__(hidden_size, params_dtype=params_dtype, **kwargs)
        self.parameter("bias", hidden_size, dtype=params_dtype)


class GroupedLinear(TEModule):
    """`weight0`, `weight1`, … and the biases."""

    def __init__(
        self, num_gemms: int, in_features: int, out_features: int, *, bias: bool, parallel_mode: str | None,
        tp_size: int, params_dtype: torch.dtype, **_kwargs: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.num_gemms, self.use_bias = num_gemms, bias
        rows = out_features // (tp_size if parallel_mode == "column" else 1)
        columns = in_features // (tp_size if parallel_mode == "row" else 1)
        for number in range(num_gemms):
            self.parameter(f"weight{number}", rows, columns, dtype=params_dtype)
            if bias:
                self.parameter(f"bias{number}", rows, dtype=params_dtype)


def _without_attention_state(_module: torch.nn.Module, keys: Any) -> None:
    """Let the extra state of an attention be absent, as Transformer Engine does."""
    keys.missing_keys[:] = [key for key in keys.missing_keys if "core_attention._extra_state" not in key]


class DotProductAttention(TEModule):
    """`softmax_offset` in float32 where it is learnable."""

    def __init__(
        self, num_attention_heads: int, *, tp_size: int, softmax_type: str = "vanilla", **_kwargs: Any
    ) -> None:
        super().__init__()
        if softmax_type == "learnable":
            self.parameter("softmax_offset", num_attention_heads // tp_size)
        self.register_load_state_dict_post_hook(_without_attention_state)


class GatedRMSNorm(torch.nn.Module):
    """mamba_ssm's norm before a gate: `weight`."""

    def __init__(self, hidden_size: int, *, dtype: torch.dtype, **_kwargs: Any) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.full((hidden_size,), float("nan"), dtype=dtype))
        self.register_parameter("bias", None)


def _never(*_args: Any, **_kwargs: Any) -> Any:
    raise AssertionError("a stand-in was run")


# Package → what megatron imports from it.
STAND_INS: dict[str, dict[str, Any]] = {
    "transformer_engine": {"__version__": VERSION},
    "transformer_engine.common": {},
    "transformer_engine.common.recipe": {"DelayedScaling": type("DelayedScaling", (), {})},
    "transformer_engine.pytorch": {
        "Linear": Linear, "LayerNormLinear": LayerNormLinear, "RMSNorm": RMSNorm, "LayerNorm": LayerNorm,
        "GroupedLinear": GroupedLinear, "DotProductAttention": DotProductAttention,
    },
    "transformer_engine.pytorch.distributed": {
        "CudaRNGStatesTracker": type("CudaRNGStatesTracker", (), {}), "activation_recompute_forward": _never,
    },
    "transformer_engine.pytorch.fp8": {"FP8GlobalStateManager": _never, "fp8_autocast": _never},
    "transformer_engine.pytorch.ops": {"Sequential": TEModule, "FusibleOperation": TEModule},
    "transformer_engine.pytorch.tensor": {"QuantizedTensor": type("QuantizedTensor", (), {})},
    "transformer_engine.pytorch.router": {
        "fused_compute_score_for_moe_aux_loss": _never, "fused_moe_aux_loss": _never,
        "fused_topk_with_score_function": _never,
    },
    "mamba_ssm": {"__version__": "2.2.6"},
    "mamba_ssm.ops": {},
    "mamba_ssm.ops.triton": {},
    "mamba_ssm.ops.triton.selective_state_update": {"selective_state_update": _never},
    "mamba_ssm.ops.triton.layernorm_gated": {"RMSNorm": GatedRMSNorm},
    "mamba_ssm.ops.triton.ssd_combined": {
        "mamba_chunk_scan_combined": _never, "mamba_split_conv1d_scan_combined": _never,
    },
    "megatron.core.inference.contexts.attention_context.triton.tensor_ops": {
        "tensor_get_slice_after": _never, "tensor_masked_update": _never, "tensor_merge": _never,
    },
    "fla": {}, "fla.modules": {}, "fla.ops": {},
    "fla.modules.l2norm": {"l2norm": _never},
    "fla.ops.gated_delta_rule": {"chunk_gated_delta_rule": _never},
}  # fmt: skip


def install() -> None:
    """Put the stand-ins where imports find them, and answer questions about CUDA with the CPU."""
    install_cuda_shim()
    for name, content in STAND_INS.items():
        module = ModuleType(name)
        vars(module).update(content, __path__=[])
        sys.modules[name] = module
        parent, _, child = name.rpartition(".")
        if parent in sys.modules:
            setattr(sys.modules[parent], child, module)


def without_random_states() -> None:
    """Let megatron draw initial values without CUDA's random states."""
    from megatron.core.tensor_parallel import random

    random.CudaRNGStatesTracker.fork = lambda *_args, **_kwargs: nullcontext()
