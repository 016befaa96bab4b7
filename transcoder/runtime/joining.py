"""What a block's output goes through before it joins the residual stream, and what the model's ends multiply by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from megatron.core.activations import fast_gelu, quick_gelu
from torch.nn import functional

from transcoder.runtime.norms import norm_of


class Join(torch.nn.Module):  # type: ignore[misc]
    """In the place of megatron-core's sum of bias and residual: with a norm before it, or a factor."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.multiplier = config.residual_multiplier
        self.norm = norm_of(config)(config, config.hidden_size, config.layernorm_epsilon) if config.post_norms else None

    def forward(self, *_how: Any) -> Callable[..., Any]:
        """What megatron-core calls with an output and its bias, the residual and a probability."""
        return self._joined

    def _joined(self, added: tuple[Any, Any], residual: Any, *_dropout: Any) -> Any:
        out, bias = added
        with torch.set_grad_enabled(out.requires_grad or residual.requires_grad):  # megatron-core switches it on
            out = out if bias is None else out + bias
            out = out if self.norm is None else self.norm(out)
            return residual + (out if self.multiplier == 1.0 else out * self.multiplier)


def joins(config: Any) -> bool:
    """Whether a model needs more than a sum."""
    return bool(config.post_norms) or config.residual_multiplier != 1.0


def _quick_gelu(input: Any) -> Any:
    return input * torch.sigmoid(1.702 * input)


def plain_activation(function: Any) -> Any:
    """An activation as transformers computes it; megatron-core's are compiled, and may round more often."""
    return {fast_gelu: partial(functional.gelu, approximate="tanh"), quick_gelu: _quick_gelu}.get(function, function)


def finishes(config: Any) -> bool:
    """Whether logits are more than what the output layer gives."""
    return config.logits_softcap is not None or config.logits_scaling != 1.0


def complete(model: Any) -> None:
    """Let the embedding and the output layer of a stage give what a model's multipliers and its soft-cap make of it."""
    if model.pre_process and model.config.embedding_multiplier != 1.0:
        inner, embedding = model.config.inner_multiplier, model.embedding
        (embedding.word_embeddings if inner else embedding).register_forward_hook(_multiplied(model.config))
    if model.post_process and finishes(model.config):
        model.output_layer.register_forward_hook(_finished(model.config))


def _multiplied(config: Any) -> Callable[..., Any]:
    factor = config.embedding_multiplier
    if config.inner_multiplier:
        factor = float(torch.tensor(factor).to(config.params_dtype))
    return lambda _module, _inputs, out: out * factor


def _finished(config: Any) -> Callable[..., Any]:
    cap, divisor = config.logits_softcap, config.logits_scaling

    def finish(_module: Any, _inputs: Any, out: tuple[Any, Any]) -> tuple[Any, Any]:
        logits = out[0] if divisor == 1.0 else out[0] / divisor
        return (logits if cap is None else torch.tanh(logits / cap) * cap), out[1]

    return finish
