"""The arithmetic of parallel linear layers without gradients: lean, or exact.

Lean leaves out megatron-core's autograd functions, which change no bit and cost a tenth of a small model's time.
Exact computes in float64 and rounds once, so that cutting a layer over ranks changes no bit of its results.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from torch.nn import functional

Multiply = Callable[..., Any]


def _lean(input: Any, weight: Any, bias: Any = None) -> Any:
    return functional.linear(input, weight, bias)


def _wide(input: Any, weight: Any, bias: Any = None) -> Any:
    return functional.linear(input.double(), weight.double(), None if bias is None else bias.double())


def _column(
    multiply: Multiply, dtype: Any, layer: Any, input: Any, weight: Any = None, runtime_gather_output: Any = None
) -> tuple[Any, Any]:
    """Instead of a column-parallel layer's forward; dtype: of the output, the input's when None."""
    added, returned = (None, layer.bias) if layer.skip_bias_add else (layer.bias, None)
    out = multiply(input, layer.weight if weight is None else weight, added).to(dtype or input.dtype)
    gather = layer.gather_output if runtime_gather_output is None else runtime_gather_output
    if gather and layer.tp_group.size() > 1:
        out = gather_from_tensor_model_parallel_region(out, group=layer.tp_group)
    return out, returned


def _row(multiply: Multiply, layer: Any, input: Any) -> tuple[Any, Any]:
    """Instead of a row-parallel layer's forward: the sum over ranks and the bias come before the rounding."""
    if layer.is_expert or layer.explicit_expert_comm:  # the sum and the bias are the dispatcher's
        return multiply(input, layer.weight).to(input.dtype), layer.bias
    if layer.tp_group.size() == 1:
        return multiply(input, layer.weight, layer.bias).to(input.dtype), None
    total = multiply(input, layer.weight)
    dist.all_reduce(total, group=layer.tp_group)
    return (total if layer.bias is None else total + layer.bias.to(total.dtype)).to(input.dtype), None


def _exact(function: Multiply, input: Any) -> Any:
    """Vector units and the scalar rest of a row give different last bits; in float64 both round to the same."""
    return function(input.double()).to(input.dtype)


def _exchange(model: Any, multiply: Multiply, logits: Any) -> None:
    for name, layer in model.named_modules():
        if isinstance(layer, RowParallelLinear):
            layer.forward = partial(_row, multiply, layer)
        elif isinstance(layer, ColumnParallelLinear):
            layer.skip_bias_add = layer.is_expert  # else rounded with the product, not after it
            layer.forward = partial(_column, multiply, logits if name.endswith("output_layer") else None, layer)


def make_lean(model: Any) -> None:
    """Let the parallel layers of a model compute as they do, for inference alone."""
    _exchange(model, _lean, None)


def make_exact(model: Any) -> None:
    """Let the parallel layers of a model compute in float64; its logits leave in float32."""
    model.config.activation_func = partial(_exact, model.config.activation_func)
    _exchange(model, _wide, torch.float32)
