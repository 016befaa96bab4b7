"""Hugging Face models of mixtures with one mistake, as a converter with a wrong rule would make it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from oracle import read_tensors
from safetensors.torch import load_file, save_file

Tensors = dict[str, torch.Tensor]
LAYERS = range(4)
ATTENTION, MLP = "model.layers.{}.self_attn.", "model.layers.{}.mlp."


def _exchanged(tensors: Tensors, one: str, other: str) -> Tensors:
    """The tensors of two names exchanged, in every layer."""
    pairs = [(one.format(layer), other.format(layer)) for layer in LAYERS]
    return {name: tensors[partner] for left, right in pairs for name, partner in ((left, right), (right, left))}


def _two_experts(tensors: Tensors) -> Tensors:
    """Experts 0 and 1 exchanged."""
    names = (f"{part}_proj.weight" for part in ("gate", "up", "down"))
    parts = [_exchanged(tensors, f"{MLP}experts.0.{name}", f"{MLP}experts.1.{name}") for name in names]
    return {name: tensor for part in parts for name, tensor in part.items()}


def _gate_and_up(prefix: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: _exchanged(tensors, f"{MLP}{prefix}gate_proj.weight", f"{MLP}{prefix}up_proj.weight")


def _reversed(name: str, blocks: int) -> Callable[[Tensors], Tensors]:
    """The blocks of axis 0 of a tensor in the opposite order, in every layer."""

    def alter(tensors: Tensors) -> Tensors:
        names = [name.format(layer) for layer in LAYERS]
        return {each: torch.cat(tensors[each].chunk(blocks)[::-1]) for each in names}

    return alter


def _negated(name: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name.format(layer): -tensors[name.format(layer)] for layer in LAYERS}


# The mistake: kind, what it does, the Megatron parameters of each layer that it spoils.
MISTAKES: Mapping[str, tuple[str, Callable[[Tensors], Tensors], set[str]]] = {
    "experts exchanged": (
        "qwen2-moe",
        _two_experts,
        {f"mlp.experts.local_experts.{expert}.linear_fc{n}.weight" for expert in (0, 1) for n in (1, 2)},
    ),
    "gate and up exchanged": (
        "qwen2-moe",
        _gate_and_up("experts.2."),
        {"mlp.experts.local_experts.2.linear_fc1.weight"},
    ),
    "gate and up of the shared expert exchanged": (
        "qwen2-moe",
        _gate_and_up("shared_expert."),
        {"mlp.shared_experts.linear_fc1.weight"},
    ),
    "router reversed": ("qwen2-moe", _reversed(f"{MLP}gate.weight", 12), {"mlp.router.weight"}),
    "gate of the shared expert negated": (
        "qwen2-moe",
        _negated(f"{MLP}shared_expert_gate.weight"),
        {"mlp.shared_experts.gate_weight"},
    ),
    "heads of the query norm reversed": (
        "olmoe",
        _reversed(f"{ATTENTION}q_norm.weight", 12),
        {"self_attention.q_layernorm.weight"},
    ),
    "groups of the key norm reversed": (
        "olmoe",
        _reversed(f"{ATTENTION}k_norm.weight", 4),
        {"self_attention.k_layernorm.weight"},
    ),
}


def make_mistaken(name: str, source: Path, target: Path) -> Path:
    """A copy of the model with the mistake."""
    shutil.copytree(source, target)
    changed = MISTAKES[name][1](read_tensors(source))
    for file in target.glob("*.safetensors"):
        tensors = {key: changed.pop(key, tensor).contiguous() for key, tensor in load_file(file).items()}
        save_file(tensors, file, metadata={"format": "pt"})
    assert not changed
    return target
