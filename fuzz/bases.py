"""The good folders in which a target puts its input: a one-layer model and the checkpoint that it becomes."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from transcoder import api
from transcoder.formats.safetensors import emit_header
from transcoder.spec import DTYPES

ARCHITECTURE = "LlamaForCausalLM"
CONFIG: dict[str, Any] = {
    "architectures": [ARCHITECTURE], "model_type": "llama", "hidden_size": 8, "intermediate_size": 8,
    "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4, "num_hidden_layers": 1, "vocab_size": 8,
    "max_position_embeddings": 16, "rms_norm_eps": 1e-5, "rope_theta": 10000.0, "hidden_act": "silu",
    "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LAYER = {
    "self_attn.q_proj": (8, 8), "self_attn.k_proj": (4, 8), "self_attn.v_proj": (4, 8), "self_attn.o_proj": (8, 8),
    "mlp.gate_proj": (8, 8), "mlp.up_proj": (8, 8), "mlp.down_proj": (8, 8), "input_layernorm": (8,),
    "post_attention_layernorm": (8,),
}  # fmt: skip
_ENDS = {"model.embed_tokens": (8, 8), "model.norm": (8,), "lm_head": (8, 8)}


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    return {f"{name}.weight": shape for name, shape in _ENDS.items()} | {
        f"model.layers.0.{name}.weight": shape for name, shape in _LAYER.items()
    }


def safetensors_file() -> bytes:
    """The model's one file."""
    header = emit_header([(name, DTYPES["bfloat16"], shape) for name, shape in shapes().items()], {"format": "pt"})
    size = sum(2 * shape[0] * (shape[1] if len(shape) > 1 else 1) for shape in shapes().values())
    return header + bytes(range(1, 65)) * (size // 64) + bytes(size % 64)


@cache
def root() -> Path:
    """A folder of this process's own, removed at its end."""
    place = tempfile.TemporaryDirectory(prefix="fuzz-")
    atexit.register(place.cleanup)
    return Path(place.name)


@cache
def model() -> Path:
    """The good model, in one file."""
    folder = root() / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "model.safetensors").write_bytes(safetensors_file())
    return folder


@cache
def checkpoint() -> Path:
    """The good checkpoint: manifest, hf/, trackers and Bridge's files included."""
    folder = root() / "checkpoint"
    api.hf2mcore(model(), folder, sync=False, workers=1, make_vocab_size_divisible_by=16)
    return folder


@cache
def arrays(form: str) -> Path:
    """The iteration of a checkpoint of zarr arrays, without manifest and hf/."""
    folder = root() / form
    api.hf2mcore(model(), folder, format=form, sync=False, workers=1, make_vocab_size_divisible_by=16)
    (iteration(folder) / "transcode-manifest.json").unlink()
    shutil.rmtree(iteration(folder) / "hf")
    return iteration(folder)


@cache
def spare(name: str) -> Path:
    """A copy of the model: one a target."""
    return shutil.copytree(model(), root() / f"spare-{name}")


@cache
def plain(name: str) -> Path:
    """A copy of the checkpoint without the manifest, which would refuse any change, and without hf/: one a target."""
    folder = root() / f"plain-{name}"
    shutil.copytree(checkpoint(), folder, symlinks=True)
    (iteration(folder) / "transcode-manifest.json").unlink()
    shutil.rmtree(iteration(folder) / "hf")
    return folder


@cache
def whole(name: str) -> Path:
    """A copy of the checkpoint with everything in it: one a target."""
    return shutil.copytree(checkpoint(), root() / f"whole-{name}", symlinks=True)


@cache
def ranks() -> Path:
    """The folder for a legacy checkpoint of one rank, whose file is the input."""
    folder = root() / "ranks" / "iter_0000001" / "mp_rank_00"
    folder.mkdir(parents=True)
    (folder.parents[1] / "latest_checkpointed_iteration.txt").write_text("1")
    return folder


def iteration(folder: Path) -> Path:
    """The iteration directory of a checkpoint."""
    return folder / "iter_0000000"
