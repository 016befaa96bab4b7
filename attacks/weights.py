"""Weights that are missing, strange, or not those of the configuration; numbers that are not numbers."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import Tensors, read_tensors, table, write_file
from attacks.safetensors_files import NORM, QUERY

INDEX = "model.safetensors.index.json"
HF = "hf2mcore"


def change(bench: Bench, how: Callable[[Tensors], object]) -> None:
    """Change the model and write it as one file."""
    tensors = read_tensors(bench.source)
    how(tensors)
    for path in (bench.first, bench.second, bench.source / INDEX):
        path.unlink()
    write_file(bench.source / "model.safetensors", *table(tensors))


@attack("reject", "hf", HF, QUERY)
def missing(bench: Bench) -> None:
    """A weight is not there."""
    change(bench, lambda tensors: tensors.pop(QUERY))


@attack("reject", "hf", HF, "layers.1")
def layer_missing(bench: Bench) -> None:
    """The last layer is not there: a model cut short by a crashed save."""
    change(bench, lambda tensors: [tensors.pop(name) for name in list(tensors) if "layers.1." in name])


@attack("reject", "hf", HF, "extra")
def extra(bench: Bench) -> None:
    """A weight that no rule knows would be dropped without a word."""
    change(bench, lambda tensors: tensors.update({"model.layers.0.extra.weight": ("BF16", (16,), bytes(32))}))


@attack("reject", "hf", HF, "layers.2")
def extra_layer(bench: Bench) -> None:
    """A layer more than the configuration has."""
    change(bench, lambda tensors: tensors.update({"model.layers.2.input_layernorm.weight": ("BF16", (16,), bytes(32))}))


@attack("reject", "hf", HF, "layers")
def layer_of_a_billion(bench: Bench) -> None:
    """A layer number that would be a loop."""
    name = "model.layers.999999999.input_layernorm.weight"
    change(bench, lambda tensors: tensors.update({name: ("BF16", (16,), bytes(32))}))


@attack("reject", "hf", HF, "layers")
def layer_number_of_a_thousand_digits(bench: Bench) -> None:
    """A layer number that takes long to convert."""
    name = f"model.layers.{'9' * 5000}.input_layernorm.weight"
    change(bench, lambda tensors: tensors.update({name: ("BF16", (16,), bytes(32))}))


@attack("reject", "hf", HF, "layers")
def layer_number_with_zeros(bench: Bench) -> None:
    """`00` is another spelling of a layer that is there."""
    name = NORM.replace(".0.", ".00.")
    change(bench, lambda tensors: tensors.update({name: ("BF16", (16,), bytes(32))}))


@attack("reject", "hf", HF, "layers")
def layer_number_in_other_digits(bench: Bench) -> None:
    """An Arabic zero is a digit to `str.isdigit`, and not to a model."""
    change(bench, lambda tensors: tensors.update({NORM.replace(".0.", ".\u0660."): tensors.pop(NORM)}))


@attack("reject", "hf", HF, "down_proj")
def transposed(bench: Bench) -> None:
    """Rows and columns exchanged."""
    name = "model.layers.0.mlp.down_proj.weight"
    change(bench, lambda tensors: tensors.update({name: ("BF16", (24, 16), tensors[name][2])}))


@attack("reject", "hf", HF, "q_proj")
def rank_of_three(bench: Bench) -> None:
    """The right count of elements in another shape."""
    change(bench, lambda tensors: tensors.update({QUERY: ("BF16", (1, 16, 16), tensors[QUERY][2])}))


@attack("reject", "hf", HF, "q_proj")
def flat(bench: Bench) -> None:
    """The right count of elements in one dimension."""
    change(bench, lambda tensors: tensors.update({QUERY: ("BF16", (256,), tensors[QUERY][2])}))


@attack("reject", "hf", HF, "q_proj")
def scalar(bench: Bench) -> None:
    """A tensor without dimensions."""
    change(bench, lambda tensors: tensors.update({QUERY: ("BF16", (), bytes(2))}))


@attack("reject", "hf", HF, "q_proj")
def empty(bench: Bench) -> None:
    """A tensor of no elements."""
    change(bench, lambda tensors: tensors.update({QUERY: ("BF16", (0, 16), b"")}))


@attack("reject", "hf", HF, "q_proj")
def integers(bench: Bench) -> None:
    """A weight of integers."""
    change(bench, lambda tensors: tensors.update({QUERY: ("I16", (16, 16), tensors[QUERY][2])}))


@attack("reject", "hf", HF, "q_proj")
def eight_bits_without_scale(bench: Bench) -> None:
    """A weight of FP8 numbers that nothing scales."""
    change(bench, lambda tensors: tensors.update({QUERY: ("F8_E4M3", (16, 16), bytes(256))}))


@attack("reject", "hf", HF, "embed|lm_head|vocab")
def vocabularies_differ(bench: Bench) -> None:
    """Embedding and output layer have two vocabularies."""
    change(
        bench, lambda tensors: tensors.update({"lm_head.weight": ("BF16", (36, 16), tensors["lm_head.weight"][2][32:])})
    )


@attack("reject", "hf", HF, "embed|lm_head|vocab")
def vocabulary_of_another_model(bench: Bench) -> None:
    """Both have a row more than the configuration says."""
    tensors = read_tensors(bench.source)
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        tensors[name] = ("BF16", (38, 16), tensors[name][2] + bytes(32))
    change(bench, lambda found: found.update(tensors))


@attack("reject", "hf", HF, "tensor|weight|empty|missing|layers")
def no_tensors(bench: Bench) -> None:
    """A file that holds nothing."""
    change(bench, lambda tensors: tensors.clear())


@attack("reject", "hf", HF, "safetensors|weights")
def no_files(bench: Bench) -> None:
    """Configuration without weights."""
    for path in (bench.first, bench.second, bench.source / INDEX):
        path.unlink()


@attack("reject", "hf", HF, r"\.bin|safetensors|pickle")
def only_pickled_weights(bench: Bench) -> None:
    """Weights in a pickle are refused, never opened."""
    for path in (bench.first, bench.second, bench.source / INDEX):
        path.unlink()
    (bench.source / "pytorch_model.bin").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


@attack("warn", "hf", "hf2mcore roundtrip", "NaN|not a number|infinit")
def not_numbers(bench: Bench) -> None:
    """NaN of several payloads, infinities, minus zero and a subnormal survive bit for bit, with a warning."""
    odd = struct.pack("<8H", 0x7FC0, 0x7F81, 0xFFFF, 0x7F80, 0xFF80, 0x8000, 0x0001, 0x8001) * 2
    change(bench, lambda tensors: tensors.update({NORM: ("BF16", (16,), odd)}))


@attack("ok", "hf", "hf2mcore roundtrip")
def zeros_and_subnormals(bench: Bench) -> None:
    """Minus zero and the smallest numbers survive bit for bit."""
    odd = struct.pack("<8H", 0x8000, 0x0000, 0x0001, 0x8001, 0x007F, 0x807F, 0x3F80, 0x7F7F) * 2
    change(bench, lambda tensors: tensors.update({NORM: ("BF16", (16,), odd)}))


@attack("warn", "hf", "hf2mcore", "consolidated")
def weights_that_no_index_names(bench: Bench) -> None:
    """Other weight files beside the shards are left out, and said to be."""
    write_file(bench.source / "consolidated.safetensors", *table(read_tensors(bench.source)))


@attack("warn", "hf", "hf2mcore", r"\.incomplete|unfinished|download")
def unfinished_download(bench: Bench) -> None:
    """What huggingface_hub leaves when it is interrupted."""
    folder = bench.source / ".cache" / "huggingface" / "download"
    folder.mkdir(parents=True)
    (folder / "model-00003-of-00003.safetensors.4d4d.incomplete").write_bytes(b"half")


@attack("reject", "hf", "hf2mcore", "00003|missing|shard|index")
def shard_count_in_names(bench: Bench) -> None:
    """Names say three shards, two are there, and no index says which tensors there should be."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    for old, new in (
        (bench.first, "model-00001-of-00003.safetensors"),
        (bench.second, "model-00003-of-00003.safetensors"),
    ):
        rows["weight_map"] = {name: new if place == old.name else place for name, place in rows["weight_map"].items()}
        old.rename(bench.source / new)
    rows["weight_map"]["model.layers.0.self_attn.rotary.weight"] = "model-00002-of-00003.safetensors"
    path.write_text(json.dumps(rows))
