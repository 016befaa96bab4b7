"""The checkpoints that the suite converts: random bytes under the names and shapes of published models."""

from __future__ import annotations

import json
import shutil
import struct
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

from synthetic import Shape, configuration, pack, random_block, size, tensors, write_json, write_shards, write_tensor

sys.path.append(str(Path(__file__).parent.parent / "tests"))
from hollow import write_sparse
from published import config_of
from published import tensors as published

LLAMA_8B = Shape(layers=8, hidden=4096, ffn=14336, head_dim=128)
# At TP 8 each rank's piece of a row of the output projection has 4 KiB, of the down projection 7 KiB.
WIDE = Shape(layers=2, hidden=4096, ffn=28672, heads=128, head_dim=128, vocabulary=32000)
TINY = Shape(layers=1, hidden=64, ffn=64, heads=2, kv_heads=2, head_dim=32, vocabulary=64)
SHAPES = {  # the Llamas: shape, and whether the output layer is tied to the embedding
    "llama-0.5g": (Shape(layers=3, vocabulary=32000), True),
    "llama-1.2g": (Shape(layers=8, vocabulary=64128), True),
    "llama-1b": (Shape(), True),
    "llama-5.6g": (LLAMA_8B, False),
    "wide": (WIDE, False),
    "tiny": (replace(TINY, layers=2, vocabulary=1024, hidden=512, heads=8, head_dim=64, ffn=1024), True),
}
MOE = "qwen3-moe-5g"
MOE_LAYERS = 3
SHARD = 1_000_000_000  # bytes
QUICK = 32  # --quick makes every source about that much smaller


def shrunk(shape: Shape) -> Shape:
    """The same model with fewer rows and heads; pieces of rows at TP 8 keep their size class."""
    return replace(shape, layers=max(2, shape.layers // 8), vocabulary=shape.vocabulary // QUICK, hidden=512)


def names(count: int) -> str:
    """The name of a source of about `count` tiny tensors."""
    return f"tensors-{count}"


def shape_of(name: str, quick: bool) -> tuple[Shape, bool]:
    """Shape and tying of a Llama; `tensors-N` has N of them, nine a layer."""
    if name.startswith("tensors-"):
        return replace(TINY, layers=int(name.split("-")[1]) // 9), True
    shape, tied = SHAPES[name]
    return (shrunk(shape) if quick and name != "tiny" else shape), tied


def moe_config(quick: bool) -> dict[str, object]:
    """Qwen3-30B-A3B with three layers; tiny experts when quick."""
    small = {"hidden_size": 256, "moe_intermediate_size": 96, "vocab_size": 4736} if quick else {}
    return config_of("Qwen3-30B-A3B") | {"num_hidden_layers": MOE_LAYERS} | small


def source_bytes(name: str, quick: bool) -> int:
    """Bytes of a source's tensors, from its shapes alone.

    >>> source_bytes("llama-1b", False)
    2471628800
    """
    if name == MOE:
        return sum(2 * prod(shape) for _, _, shape in published(moe_config(quick)))
    shape, tied = shape_of(name, quick)
    return sum(map(size, listed(shape, tied)))


def listed(shape: Shape, tied: bool) -> list[tuple[str, tuple[int, ...]]]:
    """All tensors of a Llama."""
    return [*tensors(shape), *([] if tied else [("lm_head.weight", (shape.vocabulary, shape.hidden))])]


def make(name: str, folder: Path, quick: bool) -> Path:
    """Writes a source unless it is there; returns its folder. What a stopped run left half done is made anew."""
    target, building = folder / name, folder / f"{name}.part"
    if target.exists():
        return target
    shutil.rmtree(building, ignore_errors=True)
    building.mkdir(parents=True)
    (make_moe if name == MOE else make_llama)(name, building, quick)
    return building.rename(target)


def make_llama(name: str, folder: Path, quick: bool) -> None:
    """Config, index and shards of at most 1 GB."""
    shape, tied = shape_of(name, quick)
    where = write_shards(folder, pack(listed(shape, tied), SHARD), random_block(0))
    write_json(folder / "config.json", configuration(shape) | {"tie_word_embeddings": tied})
    index = {"metadata": {"total_size": source_bytes(name, quick)}, "weight_map": dict(sorted(where.items()))}
    write_json(folder / "model.safetensors.index.json", index)


def make_moe(_name: str, folder: Path, quick: bool) -> None:
    """The published names, a tensor for every expert; holes first, then bytes in their place."""
    count = max(1, source_bytes(MOE, quick) // SHARD)
    files = [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
    write_sparse(json.loads(json.dumps(moe_config(quick))), folder, files)
    block = random_block(0)
    for number, file in enumerate(files):
        with (folder / file).open("r+b") as opened:
            (head,) = struct.unpack("<Q", opened.read(8))
            end = opened.seek(0, 2)
            opened.seek(8 + head)
            write_tensor(opened, block, number * 1_000_002, end - 8 - head)


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of whole words, which peers want to copy."""
    words = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"w{number}": number for number in range(3, 1000)}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False) | {"special": True}
    added = [{"id": number, "content": text} | flags for number, text in enumerate(list(words)[:3])]
    model = {"type": "WordLevel", "vocab": words, "unk_token": "<unk>"}
    table = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": {"type": "Whitespace"}, "post_processor": None, "decoder": None, "model": model,
    }  # fmt: skip
    write_json(folder / "tokenizer.json", table)
    names_of = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    write_json(folder / "tokenizer_config.json", {"tokenizer_class": "PreTrainedTokenizerFast"} | names_of)
