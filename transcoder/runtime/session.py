"""A model ready to run on this rank, and one forward of it over a text that grows."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state as mpu

from transcoder.errors import UsageError
from transcoder.mesh import Mesh
from transcoder.reports import costs
from transcoder.runtime.arithmetic import make_exact, make_lean
from transcoder.runtime.cache import KVCache
from transcoder.runtime.config import is_multimodal
from transcoder.runtime.images import Grid
from transcoder.runtime.load import load
from transcoder.runtime.model import build_model, stage_forward
from transcoder.runtime.vision import Positions, VisionLanguage, image_token, merge_size, rope_positions

FULL_LOGITS = 1 << 26  # elements; of a longer prompt only the last position's are computed
DTYPES = ("bfloat16", "float16", "float32")


@dataclass(frozen=True)
class Chosen:
    """What a command was asked to run, and how."""

    folder: Path  # config and tokenizer
    weights: Path
    mesh: Mesh
    dtype: str
    device: str
    exact: bool = False


@dataclass(frozen=True)
class Request:
    """One prompt in the model's terms."""

    prompt: str
    ids: tuple[int, ...]
    images: tuple[str, ...] = ()
    pixels: Any = None
    grids: tuple[Grid, ...] = ()


def vocabulary_of(config: Mapping[str, Any]) -> int:
    """The model's vocabulary, without padding."""
    return int((config.get("text_config") or config)["vocab_size"])


def context_of(config: Mapping[str, Any]) -> int:
    """The longest text that the model was made for, in tokens."""
    return int((config.get("text_config") or config).get("max_position_embeddings") or 2048)


def choose_dtype(config: Mapping[str, Any], wanted: str | None, device: str, exact: bool) -> str:
    """The compute type: float32 on a CPU and for exact sums, else the model's own."""
    if wanted or device == "cpu" or exact:
        return wanted or "float32"
    tables = (config, config.get("text_config") or {})
    names = [table.get(key) for table in tables for key in ("dtype", "torch_dtype")]
    return next((name for name in names if name in DTYPES), "bfloat16")


def open_model(config: dict[str, Any], chosen: Chosen, warn: Callable[[list[str]], object] = lambda lines: None) -> Any:
    """This rank's stage with its weights, on its device; `warn` is told what they leave out.

    Raises UsageError and InputError.
    """
    model = build_model(config, chosen.mesh, chosen.dtype, device=chosen.device)
    if chosen.exact:
        _check_exact(model, chosen.mesh)
    if is_multimodal(config):
        model = VisionLanguage(model, config).eval()
    warn(load(model, chosen.weights, chosen.folder)["warnings"])
    (make_exact if chosen.exact else make_lean)(model)
    return model


def _check_exact(model: Any, mesh: Mesh) -> None:
    if mesh.ep * mesh.etp > 1:
        raise UsageError("--exact: experts must stay on one rank; leave --ep and --etp at 1", kind="mesh")
    if mesh.tp > 1 and model.config.wide_qk_norm:
        raise UsageError("--exact: this model's query and key norms add over all heads; leave --tp at 1", kind="mesh")


def ran(config: Mapping[str, Any], chosen: Chosen, started: float, warnings: list[str]) -> dict[str, Any]:
    """What `--json` tells of every run."""
    mesh = chosen.mesh
    cost = costs(started, 0, 0)
    return {
        "architecture": config["architectures"][0],
        "dtype": chosen.dtype,
        "parallel": {"tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep, "etp": mesh.etp},
        "warnings": warnings,
        **{name: cost[name] for name in ("seconds", "peak_memory")},
    }


def last_stage() -> bool:
    """Whether this rank has the logits."""
    return bool(mpu.is_pipeline_last_stage())


def speaks() -> bool:
    """Whether this is the rank that prints: the first of the last stage."""
    return last_stage() and not mpu.get_tensor_model_parallel_rank() and not mpu.get_data_parallel_rank()


class Conversation:
    """A request and what the model adds to it; every rank makes the same calls."""

    def __init__(self, model: Any, config: Mapping[str, Any], request: Request, length: int, cached: bool) -> None:
        self.model, self.ids, self.prompt_length = model, list(request.ids), len(request.ids)
        self.stage = getattr(model, "language_model", model)
        self.device = next(self.stage.parameters()).device
        self.cache = KVCache(self.stage, 1, length) if cached else None
        self.positions = _positions(config, request) if self.stage is not model else None
        self.features = None
        if self.stage is not model and request.pixels is not None:
            self.features = model.look(torch.from_numpy(request.pixels), request.grids)

    def logits(self) -> Any:
        """Logits of the tokens not yet seen, or of all without a cache; None where another stage has them."""
        start = self.cache.used if self.cache else 0
        tokens = torch.tensor([self.ids[start:]], device=self.device)
        placed = self.positions.between(start, len(self.ids), self.device) if self.positions else None
        last_only = tokens.shape[1] * self.stage.real_vocab > FULL_LOGITS
        return stage_forward(
            self.stage, tokens, placed, self.cache, embeddings=self.embeddings(tokens, start), last_only=last_only
        )

    def embeddings(self, tokens: Any, start: int) -> Any:
        """With images in the prompt: the embeddings, which the tokens alone do not give. Else None."""
        if self.features is None or start >= self.prompt_length:
            return None
        prompt = self.model.embed(tokens[:, : self.prompt_length], self.features)
        words = tokens[:, self.prompt_length :]  # an image's token among them is the model's own word
        if not words.shape[1]:
            return prompt
        return torch.cat([prompt, self.stage.embedding(input_ids=words, position_ids=None)])

    def agree(self, token: int) -> int:
        """The last stage's token, on every stage; it joins the text."""
        if mpu.get_pipeline_model_parallel_world_size() > 1:
            box = torch.tensor([token], device=self.device)
            source = mpu.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast(box, source, group=mpu.get_pipeline_model_parallel_group())
            token = int(box)
        self.ids.append(token)
        return token


def _positions(config: Mapping[str, Any], request: Request) -> Positions:
    return Positions(rope_positions(request.ids, request.grids, image_token(config), merge_size(config)))


def check_images(config: Mapping[str, Any], ids: Sequence[int], grids: Sequence[Grid]) -> None:
    """Raise InputError when the prompt has not one token for each merged patch of the images."""
    rope_positions(ids, grids, image_token(config), merge_size(config))
