"""Lets Megatron's converters run without a GPU and without Transformer Engine: shapes of parameters, no arithmetic.

Parameters have the right shapes and are never initialised, and `.cuda()` does nothing: both favour the peer.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.machinery
import sys
import types
from typing import Any

import torch

VERSION = "2.9.0"


class Base(torch.nn.Module):
    """Takes any arguments; what is not known of it is None."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def set_tensor_parallel_group(self, _group: Any) -> None:
        """Nothing is communicated."""


def empty(module: torch.nn.Module, name: str, *shape: int, dtype: torch.dtype) -> None:
    """An uninitialised parameter."""
    module.register_parameter(name, torch.nn.Parameter(torch.empty(shape, dtype=dtype)))


class Norm(Base):
    """The weight of a norm."""

    def __init__(self, hidden_size: int, params_dtype: torch.dtype = torch.float32, **_: Any) -> None:
        super().__init__()
        empty(self, "weight", hidden_size, dtype=params_dtype)


class Linear(Base):
    """This rank's part of a linear layer."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        parallel_mode: str | None = None,
        tp_size: int = 1,
        params_dtype: torch.dtype = torch.float32,
        **_: Any,
    ) -> None:
        super().__init__()
        self.parallel_mode, self.use_bias, self.in_features, self.out_features = (
            parallel_mode,
            bias,
            in_features,
            out_features,
        )
        self.tp_size = tp_size
        rows = out_features // tp_size if parallel_mode == "column" else out_features
        columns = in_features // tp_size if parallel_mode == "row" else in_features
        empty(self, "weight", rows, columns, dtype=params_dtype)
        self.bias = None
        if bias:
            del self.bias
            empty(self, "bias", rows, dtype=params_dtype)


class LayerNormLinear(Linear):
    """A linear layer with the norm before it."""

    def __init__(
        self, in_features: int, out_features: int, params_dtype: torch.dtype = torch.float32, **named: Any
    ) -> None:
        super().__init__(in_features, out_features, params_dtype=params_dtype, **named)
        empty(self, "layer_norm_weight", in_features, dtype=params_dtype)


def no_offload(*_: Any, **__: Any) -> tuple[Any, Any]:
    """A context that does nothing, and what it would wait with."""
    return contextlib.nullcontext(), lambda tensor: tensor


KNOWN: dict[str, Any] = {
    "get_cpu_offload_context": no_offload,
    "Linear": Linear,
    "LayerNormLinear": LayerNormLinear,
    "RMSNorm": Norm,
    "LayerNorm": Norm,
}


class Module(types.ModuleType):
    """A module in which every name exists: a class of its own each."""

    def __getattr__(self, name: str) -> Any:
        if name == "__version__":
            return VERSION
        if name.startswith("__"):
            raise AttributeError(name)
        if name[0].islower() and not name.startswith(("fp8", "multi_", "get_", "cast_", "make_", "is_", "set_")):
            return importlib.import_module(f"{self.__name__}.{name}")
        found = KNOWN.get(name) or type(name, (Base,), {})
        setattr(self, name, found)
        return found


class Finder:
    """Finds transformer_engine and all below it."""

    def find_spec(self, name: str, *_: Any) -> importlib.machinery.ModuleSpec | None:
        """Of any of its modules."""
        if name.split(".")[0] not in ("transformer_engine", "transformer_engine_torch"):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """An obliging one."""
        return Module(spec.name)

    def exec_module(self, _module: types.ModuleType) -> None:
        """Nothing to run."""


def install() -> None:
    """Put everything in its place; before megatron is imported."""
    sys.meta_path.insert(0, Finder())
    torch.Tensor.cuda = lambda self, *_, **__: self
    torch.nn.Module.cuda = lambda self, *_, **__: self
    torch.cuda.current_device = lambda: torch.device("cpu")
    for name in ("set_device", "synchronize", "empty_cache", "manual_seed", "reset_peak_memory_stats"):
        setattr(torch.cuda, name, lambda *_, **__: None)
    torch.cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda *_, **__: None
