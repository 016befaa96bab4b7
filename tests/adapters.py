"""LoRA adapters made by the PEFT library itself on models of the zoo, with random updates."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch
import zoo
from safetensors.torch import load_file, save_file
from zoo_numbers import Tensors

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
QUARTERS = 4  # updates are multiples of 1/4: their products are exact in float32, in whatever order they are added


def base(kind: str) -> Any:
    """The model of a kind as transformers loads it, in float32."""
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(zoo.made(kind), dtype=torch.float32)


@torch.no_grad()
def trained(kind: str, folder: Path, *, exact: bool = True, seed: int = 3, **config: Any) -> Any:
    """A PEFT model whose adapter has random updates, saved to `folder`. config: of `LoraConfig`.

    exact: B · A can be computed without rounding.
    """
    from peft import LoraConfig, get_peft_model

    fields = {"r": 4, "lora_alpha": 8, "target_modules": LINEARS, "task_type": "CAUSAL_LM"} | config
    model = get_peft_model(base(kind), LoraConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.named_parameters():
        if "lora_magnitude" in name:
            tensor.mul_(1 + torch.rand(tensor.shape, generator=generator))
        elif "lora_" in name or "modules_to_save" in name:
            whole = torch.randint(-2 * QUARTERS, 2 * QUARTERS + 1, tensor.shape, generator=generator) / QUARTERS
            tensor.copy_(whole if exact else torch.randn(tensor.shape, generator=generator) / 8)
    model.save_pretrained(folder)
    return model


def merged(model: Any) -> Tensors:
    """The weights after PEFT has merged the adapter, by their names in the base model's files."""
    return {name: tensor.detach() for name, tensor in model.merge_and_unload().state_dict().items()}


def written(folder: Path, tensors: Tensors, **config: Any) -> Path:
    """An adapter directory of these tensors. config: fields of adapter_config.json."""
    folder.mkdir(parents=True)
    save_file({name: tensor.clone() for name, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    fields = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": LINEARS, "bias": "none"} | config
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def changed(folder: Path, **config: Any) -> Path:
    """The adapter with other fields in its config."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    return folder


def tensors(folder: Path) -> Tensors:
    """What an adapter directory holds."""
    found: Tensors = load_file(folder / "adapter_model.safetensors")
    return found


def updates(weights: Tensors, names: str, rank: int = 4, seed: int = 5) -> Tensors:
    """Random exact updates of every matrix whose name matches, with PEFT's keys."""
    generator = torch.Generator().manual_seed(seed)
    found: Tensors = {}
    for name in sorted(name for name in weights if re.fullmatch(names, name)):
        rows, columns = weights[name].shape
        stem = "base_model.model." + name.removesuffix(".weight")
        for part, shape in (("A", (rank, columns)), ("B", (rows, rank))):
            found[f"{stem}.lora_{part}.weight"] = torch.randint(-8, 9, shape, generator=generator) / 4
    return found
