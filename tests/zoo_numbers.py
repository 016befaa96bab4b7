"""Random tensors of the zoo: all elements differ; and its quantised files: random codes with scales."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

Config = dict[str, Any]
Tensors = dict[str, torch.Tensor]


def seeded(seed: int) -> torch.Generator:
    """A source of random numbers of one's own."""
    return torch.Generator().manual_seed(seed)


def distinct_values(seed: int) -> Iterator[torch.Tensor]:
    """Every bfloat16 number with an exponent of -60 to -1, shuffled anew for ever."""
    codes = torch.arange(67 << 7, 127 << 7, dtype=torch.int32)
    codes, chance = torch.cat([codes, codes | 0x8000]).to(torch.int16), seeded(seed)
    while True:
        yield codes[torch.randperm(len(codes), generator=chance)].view(torch.bfloat16)


def numbers(shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """Different numbers; in float32 none of them is a bfloat16 number."""
    count, parts = torch.Size(shape).numel(), distinct_values(seed)
    if count > 15360 and len(shape) == 3:  # one by one, since the file may hold them so
        return torch.stack([numbers(shape[1:], seed + 37 * (n + 1), dtype) for n in range(shape[0])])
    whole = torch.cat([next(parts) for _ in range(count // 15360 + 1)])[:count].reshape(shape).clone()
    return whole if dtype == torch.bfloat16 else (whole.float().view(torch.int32) | 1).view(torch.float32)


def near_one(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Different bfloat16 numbers from 0.25 to 4."""
    codes = (125 << 7) + torch.randperm(4 << 7, generator=seeded(seed))[: torch.Size(shape).numel()]
    return codes.to(torch.int16).view(torch.bfloat16).reshape(shape)


# What the released files of DeepSeek-V3 and Kimi-K2 quantise: every linear of a layer but the router's and eh_proj.
QUANTISED = re.compile(r".*\.(self_attn|mlp)\.(.*\.)?\w+_proj(_with_mqa)?\.weight")
FP8_CONFIG = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]}
KEPT = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
MXFP4_CONFIG = {"modules_to_not_convert": KEPT, "quant_method": "mxfp4"}


def in_fp8(tensors: Tensors, config: Config) -> Tensors:
    """The linears of the layers as random e4m3 codes, one float32 scale per block."""
    config["quantization_config"] = FP8_CONFIG
    found: Tensors = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        found[name] = tensor
        if QUANTISED.fullmatch(name):
            codes = torch.randint(-0x7F, 0x7F, tensor.shape, generator=seeded(number), dtype=torch.int16)
            found[name] = torch.where(codes < 0, 0x7F - codes, codes).to(torch.uint8).view(torch.float8_e4m3fn)
            blocks = tuple(-(-extent // 128) for extent in tensor.shape)
            found[f"{name}_scale_inv"] = numbers(blocks, number, torch.float32).abs()
    return found


def in_mxfp4(tensors: Tensors, config: Config) -> Tensors:
    """The experts as random pairs of E2M1 codes and E8M0 scales."""
    config["quantization_config"] = MXFP4_CONFIG
    found: Tensors = {}
    for number, (name, tensor) in enumerate(tensors.items()):
        if not re.fullmatch(r".*\.experts\.(gate_up|down)_proj", name):
            found[name] = tensor
            continue
        experts, columns, rows = tensor.shape
        groups, chance = (experts, rows, columns // 32), seeded(number)
        found[f"{name}_blocks"] = torch.randint(0, 256, (*groups, 16), generator=chance, dtype=torch.uint8)
        found[f"{name}_scales"] = torch.randint(100, 130, groups, generator=chance, dtype=torch.uint8)
    return found
