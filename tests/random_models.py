"""Random Llama directories of every dtype and sharding, as small as grouped heads and uneven stages allow."""

from __future__ import annotations

import json
import random
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from safetensors import deserialize

HIDDEN, HEADS, GROUPS, HEAD, FFN, VOCAB, LAYERS = 24, 6, 3, 4, 30, 37, 3
WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4}
CODES = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}


@dataclass(frozen=True)
class Source:
    """What a generated model directory looks like."""

    dtype: str = "bfloat16"
    tied: bool = False
    biased: bool = False
    shards: int = 2
    indent: int | None = 2
    header_padding: int = 0
    seed: int = 0


SOURCES = st.builds(
    Source,
    dtype=st.sampled_from(sorted(WIDTHS)),
    tied=st.booleans(),
    biased=st.booleans(),
    shards=st.integers(1, 4),
    indent=st.sampled_from([None, 0, 2]),
    header_padding=st.sampled_from([0, 8, 1000]),
    seed=st.integers(0, 999),
)


def shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    query, key = HEADS * HEAD, GROUPS * HEAD
    rows = {"q_proj": (query, HIDDEN), "k_proj": (key, HIDDEN), "v_proj": (key, HIDDEN), "o_proj": (HIDDEN, query)}
    layer = {f"self_attn.{name}.weight": shape for name, shape in rows.items()}
    layer |= {f"self_attn.{name}.bias": shape[:1] for name, shape in rows.items() if source.biased}
    layer |= {f"mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
    layer |= {"mlp.down_proj.weight": (HIDDEN, FFN)}
    layer |= {f"{name}_layernorm.weight": (HIDDEN,) for name in ("input", "post_attention")}
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    found |= {} if source.tied else {"lm_head.weight": (VOCAB, HIDDEN)}
    return found | {f"model.layers.{n}.{name}": shape for n in range(LAYERS) for name, shape in layer.items()}


def config(source: Source) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "num_attention_heads": HEADS,
        "num_key_value_heads": GROUPS,
        "intermediate_size": FFN,
        "vocab_size": VOCAB,
        "num_hidden_layers": LAYERS,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": source.tied,
        "attention_bias": source.biased,
        "torch_dtype": source.dtype,
    }


def write_model(folder: Path, source: Source) -> Path:
    """A model directory: any bits as weights, tensors spread over the shards at random, and some side files."""
    chance = random.Random(source.seed)
    files: dict[str, list[str]] = {shard_name(n, source.shards): [] for n in range(source.shards)}
    for n, name in enumerate(shapes(source)):
        files[[*files][n] if n < source.shards else chance.choice([*files])].append(name)
    side = {"config.json": config(source), "tokenizer.json": {"seed": source.seed}, "extra/deep/notes.json": [1]}
    if source.shards > 1:
        where = {name: file for file, names in files.items() for name in names}
        side["model.safetensors.index.json"] = {"metadata": {"total_size": 0}, "weight_map": where}
    for name, value in side.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(json.dumps(value, indent=source.indent))
    for file, names in files.items():
        (folder / file).write_bytes(shard(source, names, chance))
    return folder


def shard(source: Source, names: list[str], chance: random.Random) -> bytes:
    """A safetensors file with random bits in the given order; the header may end in spaces."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in names:
        shape = shapes(source)[name]
        start, end = end, end + prod(shape) * WIDTHS[source.dtype]
        header[name] = {"dtype": CODES[source.dtype], "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + source.header_padding)
    return len(text).to_bytes(8, "little") + text + chance.randbytes(end)


def shard_name(number: int, count: int) -> str:
    """As transformers names weight files."""
    return "model.safetensors" if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def tensors_of(folder: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Every tensor of a model directory, read by the safetensors package."""
    rows = [row for path in sorted(folder.glob("*.safetensors")) for row in deserialize(path.read_bytes())]
    return {name: (row["dtype"], tuple(row["shape"]), bytes(row["data"])) for name, row in rows}
