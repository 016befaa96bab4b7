"""Writes a synthetic Llama checkpoint of the Llama-3.2-1B shape: real names and shapes, random bytes as bf16.

Needs NumPy only; the safetensors headers are written by hand. The same options give the same bytes:

    python benchmarks/synthetic.py work/llama-1b            # 16 layers, 2.5 GB
    python benchmarks/synthetic.py work/llama-2b --layers 32
"""

from __future__ import annotations

import argparse
import json
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import BinaryIO

import numpy as np

BLOCK = 64 << 20
STRIDE = 1_000_003 * 2  # bytes between the starts of two tensors inside the block: even, and never in step with it


@dataclass(frozen=True)
class Shape:
    """The sizes of one Llama model; the defaults are Llama-3.2-1B's."""

    layers: int = 16
    hidden: int = 2048
    ffn: int = 8192
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 64
    vocabulary: int = 128256


Tensor = tuple[str, tuple[int, ...]]


def layer_tensors(shape: Shape, layer: int) -> Iterator[Tensor]:
    """The nine tensors of one decoder layer."""
    prefix = f"model.layers.{layer}."
    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield prefix + "input_layernorm.weight", (shape.hidden,)
    yield prefix + "mlp.down_proj.weight", (shape.hidden, shape.ffn)
    yield prefix + "mlp.gate_proj.weight", (shape.ffn, shape.hidden)
    yield prefix + "mlp.up_proj.weight", (shape.ffn, shape.hidden)
    yield prefix + "post_attention_layernorm.weight", (shape.hidden,)
    yield prefix + "self_attn.k_proj.weight", (keys, shape.hidden)
    yield prefix + "self_attn.o_proj.weight", (shape.hidden, queries)
    yield prefix + "self_attn.q_proj.weight", (queries, shape.hidden)
    yield prefix + "self_attn.v_proj.weight", (keys, shape.hidden)


def tensors(shape: Shape) -> list[Tensor]:
    """All tensors, in file order; the output layer is tied to the embedding, so it has none.

    >>> len(tensors(Shape()))
    146
    >>> sum(prod(sizes) for _, sizes in tensors(Shape()))
    1235814400
    """
    listed: list[Tensor] = [("model.embed_tokens.weight", (shape.vocabulary, shape.hidden))]
    for layer in range(shape.layers):
        listed.extend(layer_tensors(shape, layer))
    listed.append(("model.norm.weight", (shape.hidden,)))
    return listed


def size(tensor: Tensor) -> int:
    """Bytes of one bf16 tensor.

    >>> size(("norm", (2048,)))
    4096
    """
    return 2 * prod(tensor[1])


def pack(listed: list[Tensor], limit: int) -> list[list[Tensor]]:
    """Splits tensors, in order, into shards of at most `limit` bytes (a larger tensor gets its own shard).

    >>> [len(shard) for shard in pack([("a", (4,)), ("b", (4,)), ("c", (20,)), ("d", (1,))], 16)]
    [2, 1, 1]
    """
    shards: list[list[Tensor]] = [[]]
    held = 0
    for tensor in listed:
        if shards[-1] and held + size(tensor) > limit:
            shards.append([])
            held = 0
        shards[-1].append(tensor)
        held += size(tensor)
    return shards


def header(shard: list[Tensor]) -> bytes:
    """A safetensors header: its length as eight bytes, then JSON padded with spaces to a multiple of eight.

    >>> header([("a", (2,))])[8:].rstrip()
    b'{"__metadata__":{"format":"pt"},"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    >>> len(header([("a", (2,))])) % 8
    0
    """
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for tensor in shard:
        name, sizes = tensor
        end = start + size(tensor)
        entries[name] = {"dtype": "BF16", "shape": list(sizes), "data_offsets": [start, end]}
        start = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def random_block(seed: int) -> memoryview:
    """64 MiB of random bf16 values with the exponents of a real model's weights (|x| from 2**-15 to 2)."""
    values = np.random.default_rng(seed).integers(0, 1 << 16, BLOCK // 2, dtype=np.uint16)
    sign_and_mantissa = values & np.uint16(0x807F)
    exponent = (np.uint16(112) + ((values >> np.uint16(7)) & np.uint16(15))) << np.uint16(7)
    return memoryview((sign_and_mantissa | exponent).astype("<u2").tobytes())


def write_tensor(file: BinaryIO, block: memoryview, offset: int, length: int) -> None:
    """Writes `length` bytes of the endlessly repeated block, beginning at `offset`."""
    while length:
        offset %= len(block)
        piece = block[offset : offset + length]
        file.write(piece)
        offset += len(piece)
        length -= len(piece)


def configuration(shape: Shape) -> dict[str, object]:
    """The config.json of the shape, as transformers writes it for Llama 3.2."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 128000,
        "eos_token_id": 128001,
        "head_dim": shape.head_dim,
        "hidden_act": "silu",
        "hidden_size": shape.hidden,
        "initializer_range": 0.02,
        "intermediate_size": shape.ffn,
        "max_position_embeddings": 131072,
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": shape.heads,
        "num_hidden_layers": shape.layers,
        "num_key_value_heads": shape.kv_heads,
        "pretraining_tp": 1,
        "rms_norm_eps": 1e-05,
        "rope_scaling": {
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 8192,
            "rope_type": "llama3",
        },
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": shape.vocabulary,
    }


def write_json(path: Path, value: object) -> None:
    """Writes indented JSON with a final newline."""
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def write_shards(folder: Path, shards: list[list[Tensor]], block: memoryview) -> dict[str, str]:
    """Writes every shard; returns which file holds which tensor."""
    where: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        with (folder / name).open("wb") as file:
            file.write(header(shard))
            for tensor in shard:
                write_tensor(file, block, len(where) * STRIDE, size(tensor))
                where[tensor[0]] = name
    return where


def write_checkpoint(folder: Path, shape: Shape, limit: int, seed: int = 0) -> int:
    """Writes the whole checkpoint; returns the bytes of its tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    listed = tensors(shape)
    where = write_shards(folder, pack(listed, limit), random_block(seed))
    total = sum(map(size, listed))
    write_json(folder / "config.json", configuration(shape))
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", index)
    return total


def parse() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--shard-mb", type=int, default=1000, help="largest shard, in MB")
    parser.add_argument("--seed", type=int, default=0)
    for name, default in Shape().__dict__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return parser.parse_args()


def main() -> None:
    """Writes the checkpoint that the options describe."""
    options = parse()
    if any(options.folder.glob("*.safetensors")):
        raise SystemExit(f"{options.folder} already holds safetensors files; choose another folder")
    shape = Shape(**{name: getattr(options, name) for name in Shape().__dict__})
    begun = time.perf_counter()
    total = write_checkpoint(options.folder, shape, options.shard_mb * 1_000_000, options.seed)
    print(f"{options.folder}: {total / 1e9:.2f} GB of tensors in {time.perf_counter() - begun:.1f} s")


if __name__ == "__main__":
    main()
