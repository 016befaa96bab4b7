"""A good tiny model, and its files as Hugging Face has them, written without the tool."""

from __future__ import annotations

import json
import random
import struct
from functools import cache
from pathlib import Path
from typing import Any

HIDDEN, FFN, HEADS, GROUPS, HEAD, LAYERS, VOCAB = 16, 24, 4, 2, 4, 2, 37
SECRET = b"the-secret-of-another-user"
CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": FFN,
    "num_attention_heads": HEADS, "num_key_value_heads": GROUPS, "head_dim": HEAD, "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB, "max_position_embeddings": 64, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
    "hidden_act": "silu", "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
    "torch_dtype": "bfloat16",
}  # fmt: skip
Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]  # name: dtype, shape, payload


def shapes() -> dict[str, tuple[int, ...]]:
    """Every tensor of the model."""
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        start = f"model.layers.{layer}."
        rows = {"q_proj": (HEADS * HEAD, HIDDEN), "k_proj": (GROUPS * HEAD, HIDDEN), "v_proj": (GROUPS * HEAD, HIDDEN)}
        found |= {f"{start}self_attn.{name}.weight": shape for name, shape in rows.items()}
        found[f"{start}self_attn.o_proj.weight"] = (HIDDEN, HEADS * HEAD)
        found |= {f"{start}mlp.{name}_proj.weight": (FFN, HIDDEN) for name in ("gate", "up")}
        found[f"{start}mlp.down_proj.weight"] = (HIDDEN, FFN)
        found |= {f"{start}{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


@cache
def numbers(name: str, shape: tuple[int, ...]) -> bytes:
    """Small bfloat16 values, the same for a name every time."""
    dice, count = random.Random(name), 1
    for size in shape:
        count *= size
    return b"".join(bytes((dice.randrange(256), dice.choice((0x3C, 0xBC, 0x3D, 0xBD)))) for _ in range(count))


def model() -> Tensors:
    """The good model."""
    return {name: ("BF16", shape, numbers(name, shape)) for name, shape in shapes().items()}


def table(tensors: Tensors) -> tuple[dict[str, Any], bytes]:
    """Header and data of one file."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    data = b""
    for name, (dtype, shape, payload) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [len(data), len(data) + len(payload)]}
        data += payload
    return header, data


def write_file(path: Path, header: dict[str, Any] | str | bytes, data: bytes, length: int | None = None) -> None:
    """A safetensors file of a header, or of any text or bytes in its place."""
    head = json.dumps(header) if isinstance(header, dict) else header
    raw = head.encode() if isinstance(head, str) else head
    path.write_bytes(struct.pack("<Q", len(raw) if length is None else length) + raw + data)


def read_file(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a good file."""
    raw = path.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + size]), raw[8 + size :]


def read_tensors(folder: Path) -> Tensors:
    """Every tensor of a good model folder."""
    found: Tensors = {}
    index = folder / "model.safetensors.index.json"
    names = set(json.loads(index.read_text())["weight_map"].values()) if index.exists() else {"model.safetensors"}
    for path in sorted(folder / name for name in names):
        header, data = read_file(path)
        for name, row in header.items():
            if name != "__metadata__":
                start, stop = row["data_offsets"]
                found[name] = row["dtype"], tuple(row["shape"]), data[start:stop]
    return found


def write_model(folder: Path) -> None:
    """The good model in two shards."""
    folder.mkdir(parents=True)
    tensors = model()
    first = {name: row for name, row in tensors.items() if "layers.1" not in name and name != "lm_head.weight"}
    shards = {"model-00001-of-00002.safetensors": first}
    shards["model-00002-of-00002.safetensors"] = {name: row for name, row in tensors.items() if name not in first}
    for name, rows in shards.items():
        write_file(folder / name, *table(rows))
    places = {tensor: name for name, rows in shards.items() for tensor in rows}
    total = sum(len(row[2]) for row in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_side_files(folder)


def write_side_files(folder: Path) -> None:
    """Configuration and tokenizer."""
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2))
    (folder / "tokenizer.json").write_text('{"version": "1.0", "model": {"type": "BPE", "vocab": {}, "merges": []}}')
    (folder / "LICENSE").write_text("Do as you like.\n")
