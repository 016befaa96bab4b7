"""Quantised models of every codec, what torch makes of their numbers, and checkpoints as training leaves them."""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import zoo
from safetensors.torch import save_file
from torch.distributed import checkpoint as dcp
from zoo import read, read_config
from zoo_numbers import Config, Tensors, numbers, seeded

import transcoder
from transcoder import InputError

KINDS = (*zoo.FP8_KINDS, *zoo.MXFP4_KINDS, "kimi-k2-int4", "kimi-k2-scalar")
BLOCKWISE = KINDS[:-1]  # their scales can be found anew
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)
GROUP = 32
# As Kimi-K2-Thinking's config.json.
INT4_WEIGHTS: Config = {
    "actorder": None, "block_structure": None, "dynamic": False, "group_size": GROUP, "num_bits": 4,
    "observer": "minmax", "observer_kwargs": {}, "strategy": "group", "symmetric": True, "type": "int",
}  # fmt: skip
INT4_CONFIG: Config = {
    "config_groups": {
        "group_0": {"input_activations": None, "output_activations": None, "targets": ["Linear"]}
        | {"weights": INT4_WEIGHTS}
    },
    "format": "pack-quantized", "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None, "quant_method": "compressed-tensors", "quantization_status": "compressed",
}  # fmt: skip
WIDE: Config = {**zoo.MLA, "num_hidden_layers": 2, "hidden_size": 96, "moe_intermediate_size": 64}


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="quantised-")


@cache
def made(kind: str) -> Path:
    """A quantised model, made once and not to be changed."""
    if kind == "kimi-k2-int4":
        return save_int4(Path(_root().name) / kind)
    if kind == "kimi-k2-scalar":
        return save_scalar(Path(_root().name) / kind)
    return zoo.made(kind)


@cache
def plain(kind: str) -> Path:
    """The same model as torch decodes it to bfloat16, not to be changed."""
    source = made(kind)
    return zoo.write(Path(_root().name) / f"{kind}-plain", decoded(read(source)), plain_config(source))


def plain_config(source: Path) -> Config:
    """The config without what tells of quantised weights."""
    return {name: value for name, value in read_config(source).items() if name != "quantization_config"}


def copy_of(kind: str, place: Path) -> Path:
    """A quantised model of one's own, to be changed."""
    return Path(shutil.copytree(made(kind), place))


def save_int4(directory: Path) -> Path:
    """Kimi K2 with its routed experts as Kimi-K2-Thinking has them."""
    import transformers

    config = transformers.AutoConfig.for_model("deepseek_v3", **{**zoo.BASE, **zoo.UNTIED, **WIDE})
    torch.manual_seed(3)
    model = transformers.DeepseekV3ForCausalLM(config).bfloat16()
    model.save_pretrained(directory)
    zoo.changed(directory, _in_int4)
    return directory


def _in_int4(tensors: Tensors, config: Config) -> Tensors:
    config |= {"architectures": ["KimiK2ForCausalLM"], "model_type": "kimi_k2", "quantization_config": INT4_CONFIG}
    found = Tensors()
    for number, (name, tensor) in enumerate(tensors.items()):
        if name.endswith("e_score_correction_bias"):
            found[name] = numbers(tuple(tensor.shape), number, torch.float32)
        elif ".mlp.experts." in name:
            count, columns = tensor.shape
            codes = torch.randint(-8, 8, (count, columns), generator=seeded(number))
            stem, scales = name.removesuffix(".weight"), (count, columns // GROUP)
            found[f"{stem}.weight_packed"] = pack(codes)
            found[f"{stem}.weight_scale"] = numbers(scales, number).abs()
            found[f"{stem}.weight_shape"] = torch.tensor([count, columns], dtype=torch.int32)
        else:
            found[name] = tensor
    return found


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight integers from -8 to 7 a word, the first one lowest."""
    nibbles = (codes + 8).reshape(*codes.shape[:-1], -1, 8)
    words = (nibbles << (4 * torch.arange(8))).sum(-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)


def unpack(words: torch.Tensor) -> torch.Tensor:
    """The integers of such words."""
    return ((words[..., None].long() >> (4 * torch.arange(8))) & 15).flatten(-2) - 8


def save_scalar(directory: Path) -> Path:
    """Kimi K2 in FP8 with one scale for a whole weight, spelled with no, one and two dimensions in turn."""
    shapes: list[tuple[int, ...]] = [(), (1,), (1, 1)]

    def change(tensors: Tensors, _: Config) -> Tensors:
        for number, name in enumerate(name for name in tensors if name.endswith("_scale_inv")):
            tensors[name] = tensors[name].flatten()[0].reshape(shapes[number % 3]).clone()
        return tensors

    zoo.save_fp8("kimi-k2-fp8", directory)
    zoo.changed(directory, change)
    return directory


def wide(tensors: Tensors, name: str) -> torch.Tensor:
    """The exact values of a quantised weight, named by its largest part."""
    tensor = tensors[name]
    if name.endswith("_blocks"):
        values = torch.stack([E2M1[tensor.long() & 15], E2M1[tensor.long() >> 4]], -1).flatten(-2)
        return (values * factors(tensors, name)[..., None]).flatten(-2)
    values = unpack(tensor).double() if name.endswith("_packed") else tensor.double()
    return values * spread(factors(tensors, name), tuple(values.shape))


def scale_name(name: str) -> str:
    """The name of the scales beside the largest part of a weight."""
    if name.endswith("_blocks"):
        return name.removesuffix("_blocks") + "_scales"
    return name.removesuffix("_packed") + "_scale" if name.endswith("_packed") else f"{name}_scale_inv"


def factors(tensors: Tensors, name: str) -> torch.Tensor:
    """The scales of a weight as numbers."""
    scales = tensors[scale_name(name)].double()
    return torch.exp2(scales - 127) if name.endswith("_blocks") else scales


def spread(scales: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Scales of blocks as one for every value of a weight of two dimensions."""
    if scales.numel() == 1:
        return scales.reshape(1, 1).expand(shape)
    rows = shape[0] if scales.shape[0] == 1 else 128 if scales.shape[0] < shape[0] else 1
    columns = GROUP if rows == 1 else 128
    return scales.repeat_interleave(rows, 0).repeat_interleave(columns, 1)[: shape[0], : shape[1]]


def quantised(tensors: Tensors) -> list[str]:
    """The largest parts of the quantised weights."""
    return [name for name in tensors if scale_name(name) in tensors]


def weight_name(name: str) -> str:
    """What a quantised weight is called once it is decoded."""
    return name.removesuffix("_blocks").removesuffix("_packed")


def decoded(tensors: Tensors) -> Tensors:
    """All weights in bfloat16, in the order of the files; GPT-OSS's experts are transposed, as its BF16 files are."""
    parts = {scale_name(name) for name in quantised(tensors)}
    found = Tensors()
    for name, tensor in tensors.items():
        if scale_name(name) in tensors:
            values = wide(tensors, name).float().bfloat16()
            found[weight_name(name)] = values.transpose(1, 2).contiguous() if name.endswith("_blocks") else values
        elif name not in parts and not name.endswith(".weight_shape"):
            found[name] = tensor
    return found


def loaded(iteration: Path) -> Tensors:
    """Every tensor of a checkpoint, read by torch."""
    reader = dcp.FileSystemReader(iteration)
    rows = reader.read_metadata().state_dict_metadata.items()
    found = {key: torch.empty(row.size, dtype=row.properties.dtype) for key, row in rows if hasattr(row, "properties")}
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def imported(source: Path, place: Path, **options: Any) -> Path:
    """The iteration directory of a checkpoint of `source`."""
    transcoder.hf2mcore(source, place, sync=False, **options)
    return place / "iter_0000000"


def trained(iteration: Path, place: Path, change: Tensors) -> Path:
    """A checkpoint with these tensors in place of its own, as torch saves it: no manifest, nothing kept."""
    state = loaded(iteration) | change
    dcp.save(state, storage_writer=dcp.FileSystemWriter(place), no_dist=True)
    for name in ("metadata.json", "common.pt"):
        shutil.copy(iteration / name, place / name)
    shutil.copytree(iteration / "hf", place / "hf")
    return place


def contents(directory: Path) -> dict[str, bytes]:
    """The files of a model."""
    return {path.name: path.read_bytes() for path in directory.iterdir()}


def payloads(iteration: Path) -> dict[str, bytes]:
    """The payload files of a checkpoint and their plan."""
    return {
        path.name: path.read_bytes() for path in iteration.iterdir() if path.name.endswith((".distcp", ".metadata"))
    }


def write_shards(directory: Path, shards: dict[str, Tensors], config: Config) -> Path:
    """A model with these files."""
    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    for file, tensors in shards.items():
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / file, {"format": "pt"})
    weights = {name: file for file, tensors in shards.items() for name in tensors}
    total = sum(tensor.nbytes for tensors in shards.values() for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weights}
    for name, table in (("model.safetensors.index.json", index), ("config.json", config)):
        (directory / name).write_text(json.dumps(table, indent=2) + "\n")
    return directory


def assert_equal(found: Tensors, wanted: Tensors) -> None:
    """The same tensors of the same dtypes."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name


def refused(source: Path, place: Path, **options: Any) -> InputError:
    """The refusal of an import, after which nothing is visible."""
    place.mkdir()
    with pytest.raises(InputError) as found:
        transcoder.hf2mcore(source, place / "mcore", sync=False, **options)
    assert not list(place.iterdir())
    return found.value
