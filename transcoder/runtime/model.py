"""Builds the megatron-core GPT model of a Hugging Face config.json, and runs it forward, with a cache or without.

    model = build("path/of/a/model", tp=2)                     # this rank's stage
    cache = KVCache(model, batch=1, length=512)                # keys and values of up to 512 tokens
    logits = stage_forward(model, prompt, cache=cache, last_only=True)       # [1, 1, vocabulary] on the last stage
    logits = stage_forward(model, next_token, cache=cache)                   # [1, 1, vocabulary], one position more

Every rank makes the same calls with tokens of the same shape. On one GPU a dense model's steps of one token are CUDA
graphs from the second on, and hooks on its modules are not called there. megatron-core's own static cache keeps keys
before the rotation and rotates all of them again at every step; ours keeps them rotated, as transformers does.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from transcoder.errors import PathLike, UsageError
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime.device import init_parallel, install_cuda_shim

install_cuda_shim()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402

from transcoder.runtime.cache import KVCache  # noqa: E402
from transcoder.runtime.config import check_grid, is_multimodal, model_arguments, transformer_config  # noqa: E402
from transcoder.runtime.decoding import Recorded, recordable  # noqa: E402
from transcoder.runtime.fields import stored_model  # noqa: E402
from transcoder.runtime.joining import complete  # noqa: E402
from transcoder.runtime.latent import share_angles  # noqa: E402
from transcoder.runtime.rotary import MultimodalRotary, Rotary, TwoRotations, local_rotary, rotary  # noqa: E402
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
    arguments = model_arguments(config)
    vocab = int(arguments.pop("vocab_size"))
    model = Stage(
        mcore,
        layers,
        vocab_size=-(-vocab // tp) * tp,
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=False,
        **arguments,
    )
    model.real_vocab = vocab
    return model


def _set_factor(mcore: Any, factor: float) -> None:
    """Give megatron the factor on cos and sin: it takes it from an attribute that not every configuration has."""
    if factor < 1.0 and not mcore.multi_latent_attention:
        raise ValueError(f"a rotary attention factor below 1 ({factor}) is not supported")
    if factor != 1.0:
        mcore.yarn_rotary_scaling_factor = math.exp((factor - 1.0) / 0.1)


def build_model(
    config: dict[str, Any],
    mesh: Mesh,
    dtype: str = "float32",
    layer_spec: str | Callable[[Any], Any] = "local",
    device: str = "cpu",
) -> Any:
    """This rank's stage of the model that a parsed config.json describes, parameters unset.

    `layer_spec` is "local", or a function from ModelConfig to TransformerBlockSubmodules.
    """
    if isinstance(layer_spec, str) and layer_spec != "local":
        raise ValueError(f"unknown layer spec {layer_spec!r}")
    processes = dist.get_world_size() if dist.is_initialized() else int(os.environ.get("WORLD_SIZE", "1"))
    check_grid(config, mesh, processes)
    init_parallel(mesh)
    mcore, (inv_freq, factor) = transformer_config(config, mesh, dtype), rotary(config)
    _set_factor(mcore, factor)  # before its layers are made, some versions of which keep it
    with torch.device(device):
        layers = local_layers(mcore) if isinstance(layer_spec, str) else layer_spec(mcore)
        model = _construct(config, mcore, layers, mesh.tp)
    model.rotary_pos_emb = (MultimodalRotary if is_multimodal(config) else Rotary)(inv_freq.to(device))
    if (local := local_rotary(config)) is not None:
        model.rotary_pos_emb = TwoRotations(inv_freq.to(device), local.to(device))
    if mcore.multi_latent_attention:
        share_angles(model, factor)
    complete(model)
    cast_parameters(model, mcore.params_dtype)
    return model.eval()


def build(
    path_or_config: PathLike | dict[str, Any],
    tp: int = 1,
    pp: int = 1,
    ep: int = 1,
    etp: int = 1,
    dtype: str = "float32",
    device: str = "",
    hf_model: PathLike | None = None,
) -> Any:
    """This rank's stage of a model, parameters unset: fill it with `transcoder.load`. Public as `build_model`.

    path_or_config: a Hugging Face directory, a Megatron checkpoint that carries one (or `hf_model` names it), or a
    parsed config.json. tp, pp, ep, etp: the grid; without torchrun one process is a grid of 1. dtype: of parameters
    and of the computation. device: `cpu` or `cuda`, by default a GPU if there is one. Of Qwen2.5-VL the language
    model is built. Raises InputError for a model that the runtime does not know, UsageError for a grid that does not
    fit it.
    """
    if dtype not in ("float32", "bfloat16", "float16"):
        raise UsageError(f"--dtype {dtype}: give float32, bfloat16 or float16", kind="dtype")
    config = path_or_config if isinstance(path_or_config, dict) else config_of(path_or_config, hf_model)
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return build_model(config, Mesh(tp, pp, ep, etp), dtype, device=place)


def config_of(path: PathLike, hf_model: PathLike | None = None) -> dict[str, Any]:
    """The parsed config.json of a Hugging Face directory, or of the one that a Megatron checkpoint carries.

    Of a checkpoint without one its own configuration, in Megatron's names.
    """
    from transcoder.formats.opening import is_checkpoint
    from transcoder.iterations import find_iteration

    reference = reference_of(path, hf_model)
    if hf_model is None and not (reference / "config.json").is_file():
        folder = find_iteration(Path(path))
        if is_checkpoint(folder):
            return stored_model(folder)
    return read_config(reference)


def reference_of(path: PathLike, hf_model: PathLike | None = None) -> Path:
    """The directory with config.json and tokenizer: `hf_model`, `path`, or what the Megatron checkpoint `path` has."""
    from transcoder.iterations import find_iteration

    given = Path(hf_model or path)
    if hf_model is not None or (given / "config.json").is_file():
        return given
    folder = find_iteration(given)
    places = (folder / "hf", folder.parent / "huggingface", folder.parent.parent / "huggingface")
    return next((place for place in places if (place / "config.json").is_file()), given)


def _receive(model: Any, tokens: Any) -> None:
    """Take the hidden states of the stage before."""
    shape = (tokens.shape[1], tokens.shape[0], model.config.hidden_size)
    hidden = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
    dist.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
    model.set_input_tensor(hidden)


def _positions(model: Any, tokens: Any, positions: Any, first: int) -> Any:
    """Positions [b or 1, s], with three rows in front for a multimodal model."""
    if positions is None:
        positions = torch.arange(first, first + tokens.shape[1], device=tokens.device)[None]
    if model.position_embedding_type == "mrope" and positions.dim() == 2:
        return positions.expand(3, *positions.shape)
    return positions


def _forward(model: Any, tokens: Any, positions: Any, embeddings: Any = None) -> Any:
    """One forward of the stage, what it attends to aside."""
    if model.position_embedding_type != "mrope":
        model.rotary_pos_emb.positions = positions
    return model(tokens, positions, None, decoder_input=embeddings)


def _recorded(model: Any, cache: KVCache, tokens: Any, positions: Any) -> Any:
    """A step on a GPU after the first, which has warmed its libraries up: one recorded forward, again and again."""
    if cache.recorded is None:
        cache.recorded = Recorded(model, partial(_forward, model), tokens, positions)
    return cache.recorded.step(cache, tokens, positions)[..., : model.real_vocab]


def _only_last(_module: Any, inputs: Any) -> Any:
    return (inputs[0][-1:], *inputs[1:])


@torch.no_grad()  # type: ignore[untyped-decorator]
def stage_forward(
    model: Any,
    tokens: Any,
    positions: Any = None,
    cache: KVCache | None = None,
    *,
    embeddings: Any = None,
    last_only: bool = False,
) -> Any:
    """One forward over the pipeline, tokens [b, s] on every rank: logits [b, s, vocabulary] on the last stage.

    positions: of these tokens alone, [b, s], or [3, b, s] for Qwen2.5-VL; by default those after the cached ones.
    cache: of this stage; the tokens are added to it, and see all that it holds. embeddings: [s, b, hidden] in place
    of those of the tokens (first stage only; tokens still give the shape). last_only: logits of the last position
    alone, [b, 1, vocabulary]. The other stages return None. Raises UsageError when the cache is full.
    """
    placed = _positions(model, tokens, positions, cache.used if cache else 0)
    if cache is not None and embeddings is None and recordable(model, tokens):
        if cache.warm:
            return _recorded(model, cache, tokens, placed)
        cache.warm = True
    with ExitStack() as stack:
        if cache is not None:
            stack.enter_context(cache.attached(tokens.shape[1]))
        if last_only and model.post_process:
            stack.callback(model.output_layer.register_forward_pre_hook(_only_last).remove)
        if not model.pre_process:
            _receive(model, tokens)
        out = _forward(model, tokens, placed, embeddings if model.pre_process else None)
    if model.post_process:
        return out[..., : model.real_vocab]
    dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
    return None
