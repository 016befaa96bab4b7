"""Builds the megatron-core GPT model of a Hugging Face config.json, and runs it forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from transcoder.mesh import Mesh
from transcoder.runtime.device import init_parallel, install_cuda_shim

install_cuda_shim()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

from transcoder.runtime.config import transformer_config  # noqa: E402
from transcoder.runtime.layers import StaticRotary  # noqa: E402
from transcoder.runtime.rotary import rotary  # noqa: E402
from transcoder.runtime.specs import local_layers  # noqa: E402


class Stage(GPTModel):  # type: ignore[misc]
    """A pipeline stage whose tied embedding copies are both filled by the loader, never broadcast."""

    real_vocab: int = 0

    def setup_embeddings_and_output_layer(self) -> None:
        """Nothing: the stock method copies the embedding through CUDA."""


def cast_parameters(model: Any, dtype: Any) -> None:
    """Cast parameters only: a rounded rotary buffer changes the logits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _construct(config: dict[str, Any], mcore: Any, layers: Any, tp: int) -> Any:
    """The stage of this rank, still without weights."""
    vocab = int(config["vocab_size"])
    return Stage(
        mcore,
        layers,
        vocab_size=-(-vocab // tp) * tp,
        max_sequence_length=int(config.get("max_position_embeddings", 2048)),
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
    )


def _set_rotary(model: Any, config: dict[str, Any]) -> None:
    """Give the model our frequencies; megatron takes the factor from an attribute of its configuration."""
    inv_freq, factor = rotary(config)
    if factor < 1.0:
        raise ValueError(f"a rotary attention factor below 1 ({factor}) is not supported")
    if factor != 1.0:
        model.config.yarn_rotary_scaling_factor = math.exp((factor - 1.0) / 0.1)
    model.rotary_pos_emb = StaticRotary(inv_freq)


def build_model(
    config: dict[str, Any],
    mesh: Mesh,
    dtype: str = "float32",
    layer_spec: str | Callable[[Any], Any] = "local",
) -> Any:
    """This rank's stage of the model, parameters unset.

    `layer_spec` is "local", or a function from ModelConfig to TransformerBlockSubmodules.
    """
    if isinstance(layer_spec, str) and layer_spec != "local":
        raise ValueError(f"unknown layer spec {layer_spec!r}")
    init_parallel(mesh)
    mcore = transformer_config(config, mesh, dtype)
    layers = local_layers(mcore) if isinstance(layer_spec, str) else layer_spec(mcore)
    model = _construct(config, mcore, layers, mesh.tp)
    model.real_vocab = int(config["vocab_size"])
    _set_rotary(model, config)
    cast_parameters(model, mcore.params_dtype)
    return model.eval()


def _receive(model: Any, tokens: Any) -> None:
    """Take the hidden states of the stage before."""
    shape = (tokens.shape[1], tokens.shape[0], model.config.hidden_size)
    hidden = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
    dist.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
    model.set_input_tensor(hidden)


@torch.no_grad()  # type: ignore[untyped-decorator]
def stage_forward(model: Any, tokens: Any) -> Any:
    """One forward over the pipeline, tokens [b, s] on every rank: logits [b, s, vocabulary] on the last stage."""
    if not model.pre_process:
        _receive(model, tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    out = model(tokens, positions, None)
    if model.post_process:
        return out[..., : model.real_vocab]
    dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
    return None
