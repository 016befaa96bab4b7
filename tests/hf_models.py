"""Small Hugging Face directories without torch, and an editor of raw safetensors files that can write any damage."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from pathlib import Path
from typing import Any

INDEX = "model.safetensors.index.json"
SIZES = {"F16": 2, "BF16": 2, "F32": 4}  # bytes of an element
NAMES = {"float16": "F16", "bfloat16": "BF16", "float32": "F32"}

# heads · head_dim = hidden_size unless head_dim is given, so q_proj and o_proj are square.
BASE: dict[str, Any] = {
    "num_hidden_layers": 3, "hidden_size": 18, "num_attention_heads": 6, "num_key_value_heads": 2,
    "intermediate_size": 22, "vocab_size": 37, "max_position_embeddings": 64, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "rope_theta": 10000.0, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("llama", "LlamaForCausalLM", {}),
    "llama-tied": ("llama", "LlamaForCausalLM", {"tie_word_embeddings": True}),
    "llama-bias": ("llama", "LlamaForCausalLM", {"attention_bias": True, "mlp_bias": True}),
    "llama-attn-bias": ("llama", "LlamaForCausalLM", {"attention_bias": True}),
    "llama-groups": ("llama", "LlamaForCausalLM", {"num_key_value_heads": 6, "intermediate_size": 18}),
    "mistral": ("mistral", "MistralForCausalLM", {"head_dim": 10, "sliding_window": 7}),
    "qwen2": ("qwen2", "Qwen2ForCausalLM", {"vocab_size": 18, "use_sliding_window": False}),
    "qwen3": ("qwen3", "Qwen3ForCausalLM", {"head_dim": 14, "use_sliding_window": False}),
}
EXPERTS = {"moe_intermediate_size": 10, "num_experts_per_tok": 2, "norm_topk_prob": True}
EXPERT_KINDS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3-moe": ("qwen3_moe", "Qwen3MoeForCausalLM", {**EXPERTS, "head_dim": 14, "num_experts": 4}),
    "qwen3-moe-mixed": (
        "qwen3_moe",
        "Qwen3MoeForCausalLM",
        {**EXPERTS, "head_dim": 14, "num_experts": 4, "mlp_only_layers": [1]},
    ),
    "mixtral": ("mixtral", "MixtralForCausalLM", {"num_local_experts": 4, "intermediate_size": 10}),
    "qwen2-moe": (
        "qwen2_moe",
        "Qwen2MoeForCausalLM",
        {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 14, "decoder_sparse_step": 2},
    ),
    "olmoe": ("olmoe", "OlmoeForCausalLM", {"num_experts": 4, "intermediate_size": 10}),
}
Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a safetensors file as its header states it, and the bytes that it is given."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    data: bytes

    def retyped(self, dtype: str) -> Entry:
        """The same elements' count in another dtype, with as many bytes as that needs."""
        return replace(self, dtype=dtype, data=_sized(self.data, prod(self.shape) * SIZES[dtype]))

    def reshaped(self, shape: Sequence[int]) -> Entry:
        """Another shape, with as many bytes as that needs."""
        return replace(self, shape=tuple(shape), data=_sized(self.data, prod(shape) * SIZES[self.dtype]))


def _sized(data: bytes, size: int) -> bytes:
    return (data * (size // max(1, len(data)) + 1))[:size]


Files = dict[str, list[Entry]]  # shard name → its tensors in file order


def config_of(kind: str, **overrides: Any) -> dict[str, Any]:
    """config.json of a kind."""
    model_type, architecture, deltas = {**KINDS, **EXPERT_KINDS}[kind]
    return {"architectures": [architecture], "model_type": model_type, **BASE, **deltas, **overrides}


def shapes_of(config: Mapping[str, Any]) -> Shapes:
    """Name and shape of every tensor that a model with this config saves."""
    hidden, vocab = config["hidden_size"], config["vocab_size"]
    found: Shapes = {"model.embed_tokens.weight": (vocab, hidden), "model.norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        found["lm_head.weight"] = (vocab, hidden)
    for layer in range(config["num_hidden_layers"]):
        parts = (*_attention(config), *(_experts(config) if _is_sparse(config, layer) else _mlp(config)))
        found |= {f"model.layers.{layer}.{name}": shape for name, shape in parts}
    return found


def _is_sparse(config: Mapping[str, Any], layer: int) -> bool:
    if "num_experts" not in config and "num_local_experts" not in config:
        return False
    return layer not in config.get("mlp_only_layers", ()) and (layer + 1) % config.get("decoder_sparse_step", 1) == 0


def _attention(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, kind = config["hidden_size"], config["model_type"]
    dim = config.get("head_dim") or hidden // config["num_attention_heads"]
    queries, keys = config["num_attention_heads"] * dim, config["num_key_value_heads"] * dim
    linears = {"q": (queries, hidden), "k": (keys, hidden), "v": (keys, hidden), "o": (hidden, queries)}
    biased = "qkvo" if config.get("attention_bias") else "qkv" if kind in ("qwen2", "qwen2_moe") else ""
    for name, shape in linears.items():
        yield f"self_attn.{name}_proj.weight", shape
    for name in biased:
        yield f"self_attn.{name}_proj.bias", linears[name][:1]
    for name, width in {"q": queries, "k": keys}.items() if kind in ("qwen3", "qwen3_moe", "olmoe") else ():
        yield f"self_attn.{name}_norm.weight", (width if kind == "olmoe" else dim,)
    yield from (("input_layernorm.weight", (hidden,)), ("post_attention_layernorm.weight", (hidden,)))


def _mlp(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    for name, shape in {"gate": (ffn, hidden), "up": (ffn, hidden), "down": (hidden, ffn)}.items():
        yield f"mlp.{name}_proj.weight", shape
        if config.get("mlp_bias"):
            yield f"mlp.{name}_proj.bias", shape[:1]


def _experts(config: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, ffn = config["hidden_size"], config.get("moe_intermediate_size") or config["intermediate_size"]
    mixtral, count = config["model_type"] == "mixtral", config.get("num_experts") or config["num_local_experts"]
    place = "block_sparse_moe" if mixtral else "mlp"
    names = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    yield f"{place}.gate.weight", (count, hidden)
    for expert in range(count):
        for name, shape in zip(names, ((ffn, hidden), (ffn, hidden), (hidden, ffn)), strict=True):
            yield f"{place}.experts.{expert}.{name}.weight", shape
    if wide := config.get("shared_expert_intermediate_size"):
        yield "mlp.shared_expert_gate.weight", (1, hidden)
        for name, shape in (("gate", (wide, hidden)), ("up", (wide, hidden)), ("down", (hidden, wide))):
            yield f"mlp.shared_expert.{name}_proj.weight", shape


def make_model(kind: str, directory: Path, *, shards: int = 2, dtype: str = "bfloat16", seed: int = 7) -> Path:
    """Write the model of this kind: all elements differ where the dtype has enough values. Returns `directory`."""
    config = config_of(kind, torch_dtype=dtype)
    shapes, values = shapes_of(config), _values(seed)
    names = sorted(shapes)
    code = NAMES[dtype]
    entries = [Entry(name, code, shapes[name], _numbers(values, prod(shapes[name]), SIZES[code])) for name in names]
    directory.mkdir(parents=True)
    write_config(directory, config)
    write_files(directory, {file: entries[number::shards] for number, file in enumerate(file_names(shards))})
    return directory


def _values(seed: int) -> Iterator[int]:
    """Numbers 1 to 0x7EFF, shuffled, forever: as high halves of a float none is NaN, infinite or zero."""
    order = list(range(1, 0x7C00))
    random.Random(seed).shuffle(order)
    while True:
        yield from order


def _numbers(values: Iterator[int], count: int, size: int) -> bytes:
    taken = list(islice(values, count))
    return struct.pack(f"<{count}H", *taken) if size == 2 else struct.pack(f"<{count}I", *(v << 16 | 1 for v in taken))


def file_names(shards: int) -> list[str]:
    """Names of the weight files."""
    many = [f"model-{number + 1:05d}-of-{shards:05d}.safetensors" for number in range(shards)]
    return many if shards > 1 else ["model.safetensors"]


def write_config(directory: Path, config: Mapping[str, Any]) -> None:
    """config.json."""
    put(directory / "config.json", json.dumps(config, indent=2).encode())


def read_files(directory: Path) -> Files:
    """Every weight file of a directory."""
    return {path.name: read_entries(path.read_bytes()) for path in sorted(directory.glob("*.safetensors"))}


def read_entries(data: bytes) -> list[Entry]:
    """The tensors of a safetensors file in file order."""
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    table.pop("__metadata__", None)
    found = []
    for name, row in sorted(table.items(), key=lambda item: item[1]["data_offsets"]):
        begin, end = row["data_offsets"]
        found.append(Entry(name, row["dtype"], tuple(row["shape"]), data[start + begin : start + end]))
    return found


def emit(entries: Sequence[Entry]) -> bytes:
    """A safetensors file, whatever the entries say: names may repeat, sizes may be wrong."""
    rows, offset = ['"__metadata__":{"format":"pt"}'], 0
    for entry in entries:
        end = offset + len(entry.data)
        row = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [offset, end]}
        rows.append(f"{json.dumps(entry.name)}:{json.dumps(row)}")
        offset = end
    header = "{" + ",".join(rows) + "}"
    text = header.encode() + b" " * (-len(header) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(entry.data for entry in entries)


def write_files(directory: Path, files: Files) -> None:
    """Every weight file, and with several the index that names exactly their tensors."""
    for name, entries in files.items():
        put(directory / name, emit(entries))
    if len(files) > 1:
        write_index(directory, files)


def write_index(directory: Path, files: Files) -> None:
    """The index that names exactly the tensors of the files; the first file wins where two have one name."""
    weights: dict[str, str] = {}
    for file, entries in files.items():
        for entry in entries:
            weights.setdefault(entry.name, file)
    total = sum(len(entry.data) for entries in files.values() for entry in entries)
    table = {"metadata": {"total_size": total}, "weight_map": weights}
    put(directory / INDEX, json.dumps(table, indent=2).encode())


def put(path: Path, data: bytes) -> None:
    """Give a file this content; it is made anew if it changes, since some file systems flush a truncated one."""
    if not path.exists() or path.read_bytes() != data:
        path.unlink(missing_ok=True)
        path.write_bytes(data)
