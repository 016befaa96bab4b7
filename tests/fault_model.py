"""The smallest models on which every path of a conversion is taken."""

from __future__ import annotations

import json
import random
from math import prod
from pathlib import Path
from typing import Any

HIDDEN, HEADS, HEAD, FFN, VOCAB, LAYERS = 16, 4, 4, 20, 13, 2
Shapes = dict[str, tuple[int, ...]]


def shapes(layers: int = LAYERS, hidden: int = HIDDEN, vocabulary: int = VOCAB) -> Shapes:
    """Every tensor of a Llama with two groups of heads."""
    key = HEADS * HEAD // 2
    rows = {"q_proj": (HEADS * HEAD, hidden), "k_proj": (key, hidden), "v_proj": (key, hidden)}
    layer = {f"self_attn.{name}.weight": shape for name, shape in rows.items()}
    layer |= {"self_attn.o_proj.weight": (hidden, HEADS * HEAD), "mlp.down_proj.weight": (hidden, FFN)}
    layer |= {f"mlp.{name}_proj.weight": (FFN, hidden) for name in ("gate", "up")}
    layer |= {f"{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    found: Shapes = {"model.embed_tokens.weight": (vocabulary, hidden), "model.norm.weight": (hidden,)}
    found |= {"lm_head.weight": (vocabulary, hidden)}
    return found | {f"model.layers.{n}.{name}": shape for n in range(layers) for name, shape in layer.items()}


def config(layers: int = LAYERS, hidden: int = HIDDEN, vocabulary: int = VOCAB) -> dict[str, Any]:
    """config.json."""
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": hidden, "head_dim": HEAD,
        "num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "intermediate_size": FFN,
        "vocab_size": vocabulary, "num_hidden_layers": layers, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
        "tie_word_embeddings": False, "torch_dtype": "bfloat16",
    }  # fmt: skip


def write_llama(folder: Path, *, seed: int = 0, shards: int = 2, **sizes: int) -> Path:
    """A model of any bits in several shards, with a tokenizer and a side file."""
    folder.mkdir(parents=True)
    listed, chance = shapes(**sizes), random.Random(seed)
    where = {name: f"model-{n % shards + 1:05d}-of-{shards:05d}.safetensors" for n, name in enumerate(listed)}
    for file in dict.fromkeys(where.values()):
        (folder / file).write_bytes(_shard({name: listed[name] for name in listed if where[name] == file}, chance))
    index = {"metadata": {"total_size": 0}, "weight_map": where}
    side = {"config.json": config(**sizes), "tokenizer.json": {"seed": seed}, "model.safetensors.index.json": index}
    for name, value in side.items():
        (folder / name).write_text(json.dumps(value))
    return folder


def _shard(chosen: Shapes, chance: random.Random) -> bytes:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in chosen.items():
        start, end = end, end + 2 * prod(shape)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + chance.randbytes(end)
