"""Writes the corpus's good files, our own and those of torch and Megatron's classes: `python -m fuzz.seeds`.

Findings, and inputs that reach further, were added to fuzz/corpus by hand; what is there already stays.
"""

from __future__ import annotations

import io
import json
from argparse import Namespace
from collections.abc import Iterator
from math import prod
from pathlib import Path
from types import SimpleNamespace

from fuzz import bases
from fuzz.judge import CORPUS
from fuzz.targets import ARRAY
from transcoder.formats.archive import tensor_item
from transcoder.formats.mcore import train_state
from transcoder.formats.pickles import dumps
from transcoder.formats.safetensors import emit_header
from transcoder.manifest import NAME as MANIFEST
from transcoder.spec import DTYPES

Seed = tuple[str, str, bytes]  # target, name, content


def written() -> Iterator[Seed]:
    """What our own code writes."""
    folder = bases.iteration(bases.checkpoint())
    yield "safetensors", "model", bases.safetensors_file()
    yield "safetensors", "odd", _odd_file()
    index = {
        "metadata": {"total_size": 8},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "b.safetensors"},
    }
    yield "index", "two", json.dumps(index).encode()
    yield "index", "model", json.dumps({"weight_map": dict.fromkeys(bases.shapes(), "model.safetensors")}).encode()
    yield "config", "llama", json.dumps(bases.CONFIG).encode()
    for name, file in (
        ("metadata", ".metadata"),
        ("pickle", ".metadata"),
        ("common", "common.pt"),
        ("manifest", MANIFEST),
    ):
        yield name, "written", (folder / file).read_bytes()
    yield "backend", "written", (folder / "metadata.json").read_bytes()
    yield "run_config", "written", (folder / "run_config.yaml").read_bytes()
    yield "train_state", "written", train_state(0)
    yield "item", "written", _item()
    for target, form, name in (
        ("zarray", "zarr", f"{ARRAY}/.zarray"),
        ("zarr_json", "zarr3", f"{ARRAY}/zarr.json"),
        ("shard", "zarr3", f"{ARRAY}/c/0/0"),
    ):
        yield target, "written", (bases.arrays(form) / name).read_bytes()


def _odd_file() -> bytes:
    """Legal oddities: no metadata, an unpadded header, a scalar, an empty tensor, all dtypes."""
    tensors = [(f"t{i}", dtype, ()) for i, dtype in enumerate(DTYPES.values())] + [("empty", DTYPES["int8"], (0, 3))]
    header = emit_header(tensors, {})
    text = header[8:].rstrip()
    return len(text).to_bytes(8, "little") + text + bytes(sum(dtype.size for dtype in DTYPES.values()))


def _item() -> bytes:
    item = tensor_item(DTYPES["bfloat16"], (2, 2))
    return item.prefix + bytes(8) + item.suffix(0x6522DF69)


def texts() -> Iterator[Seed]:
    """The smallest inputs of the text formats."""
    for name, text in (("number", b"0"), ("release", b"release"), ("line", b"0\n")):
        yield "tracker", name, text
    yield "run_config", "plain", b"model:\n  num_layers: 1\n  hidden_size: 8\n  rotary_base: 1.0e+4\n"
    yield (
        "config",
        "rope",
        json.dumps({**bases.CONFIG, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}).encode(),
    )
    wide = {"text_config": bases.CONFIG, "architectures": ["Gemma3ForConditionalGeneration"]}
    yield "config", "wide", json.dumps(wide).encode()
    fp8 = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    yield "config", "quantised", json.dumps({**bases.CONFIG, "quantization_config": fp8}).encode()
    for name in ("Qwen3MoeForCausalLM", "DeepseekV3ForCausalLM", "GptOssForCausalLM", "NemotronHForCausalLM"):
        yield "config", name, json.dumps({**bases.CONFIG, "architectures": [name], "num_experts": 2}).encode()
    yield (
        "pickle",
        "values",
        dumps({"a": [1, -1, 1 << 70, 1.5, None, True, "é", b"x"], "b": ((), (1,), (1, 2), (1, 2, 3))}),
    )


def foreign() -> Iterator[Seed]:
    """What torch's own code writes."""
    import torch

    arguments = {
        "num_layers": 1,
        "hidden_size": 8,
        "rotary_base": 10000,
        "params_dtype": torch.bfloat16,
        "path": Path("x"),
    }
    for kind in (Namespace, SimpleNamespace):
        yield "common", kind.__name__, _saved({"args": kind(**arguments), "iteration": 0, "checkpoint_version": 3.0})
    yield "item", "float32", _saved(torch.zeros(2, 3))
    yield "item", "float8", _saved(torch.zeros(4).to(torch.float8_e4m3fn))
    state = {"step": torch.tensor(0, dtype=torch.int32), "do_train": torch.tensor(True)}
    yield "train_state", "torch", _saved(state)
    yield "metadata", "torch", _metadata()
    yield "rank", "torch", _saved(_rank_state())


def _rank_state() -> dict[str, object]:
    """The small model as one rank of Megatron-LM saves it, all parameters in one buffer, and the start of its Adam."""
    import torch

    layer = {
        "input_layernorm.weight": (8,),
        "self_attention.linear_qkv.weight": (16, 8),
        "self_attention.linear_proj.weight": (8, 8),
        "pre_mlp_layernorm.weight": (8,),
        "mlp.linear_fc1.weight": (16, 8),
        "mlp.linear_fc2.weight": (8, 8),
    }
    shapes = {f"decoder.layers.0.{name}": shape for name, shape in layer.items()} | {
        "embedding.word_embeddings.weight": (8, 8),
        "decoder.final_layernorm.weight": (8,),
        "output_layer.weight": (8, 8),
    }
    counts = [prod(shape) for shape in shapes.values()]
    parts = torch.zeros(sum(counts), dtype=torch.bfloat16).split(counts)
    model = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
    arguments = {
        "num_layers": 1,
        "hidden_size": 8,
        "ffn_hidden_size": 8,
        "num_attention_heads": 2,
        "num_query_groups": 1,
    }
    more = {"num_query_groups": 1, "kv_channels": 4, "norm_epsilon": 1e-5, "untie_embeddings_and_output_weights": True}
    state = {"args": Namespace(**arguments, **more), "iteration": 1, "checkpoint_version": 3.0}
    return {**state, "model": model, "optimizer": {"exp_avg": torch.zeros(4)}}


def _saved(value: object) -> bytes:
    import torch

    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def _metadata() -> bytes:
    """The plan of the small model as torch's planner makes it, in one file."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = bases.root() / "dcp"
    state = {
        "a": torch.zeros(2, 4, dtype=torch.bfloat16),
        "b": torch.zeros(3),
        "decoder._extra_state": io.BytesIO(b"x"),
    }
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    return (folder / ".metadata").read_bytes()


def main() -> None:
    """Write every seed."""
    for target, name, content in (*written(), *texts(), *foreign()):
        (CORPUS / target).mkdir(parents=True, exist_ok=True)
        (CORPUS / target / f"seed-{name}").write_bytes(content)


if __name__ == "__main__":
    main()
