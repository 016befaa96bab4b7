"""What each Megatron parameter must hold, cut naively out of the Hugging Face tensors.

Written from the format's description alone; shares no code with the converter.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

NORMS = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "self_attn.q_norm.weight",
    "self_attention.k_layernorm.weight": "self_attn.k_norm.weight",
}


def read_tensors(directory: Path | str) -> dict[str, torch.Tensor]:
    """Every tensor of the safetensors files of a folder."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(Path(directory).glob("*.safetensors")):
        tensors.update(load_file(file))
    return tensors


@dataclass(frozen=True)
class Place:
    """Where a rank is on each axis: (its number, how many)."""

    tp: tuple[int, int]
    ep: tuple[int, int] = (0, 1)
    etp: tuple[int, int] = (0, 1)


def part(tensor: torch.Tensor, axis: int, place: tuple[int, int]) -> torch.Tensor:
    """One of several equal slices."""
    rank, count = place
    assert tensor.shape[axis] % count == 0, (tensor.shape, count)
    step = tensor.shape[axis] // count
    return tensor.narrow(axis, rank * step, step)


class Oracle:
    """The expected parameters of one rank."""

    def __init__(self, directory: Path | str, config: dict[str, Any], place: Place) -> None:
        self.tensors, self.config, self.place = read_tensors(directory), config, place
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads") or self.heads
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads
        self.experts = config.get("num_experts") or config.get("num_local_experts") or 0

    def expected(self, name: str, layer: int | None) -> torch.Tensor:
        """The value of parameter `name` (without `decoder.layers.N.`) of global `layer`."""
        if layer is None:
            return self._outer(name)
        prefix = f"model.layers.{layer}."
        if name in NORMS:
            return self.tensors[prefix + NORMS[name]]
        if name.startswith("mlp.") and not name.startswith("mlp.linear_"):
            return self._mixture(prefix, name)
        module, kind = name.rsplit(".", 1)
        return getattr(self, "_" + module.rsplit(".", 1)[1])(prefix, kind)

    def _outer(self, name: str) -> torch.Tensor:
        """Embedding, output layer and final norm."""
        if name == "decoder.final_layernorm.weight":
            return self.tensors["model.norm.weight"]
        source = "model.embed_tokens.weight"
        if name == "output_layer.weight" and not self.config["tie_word_embeddings"]:
            source = "lm_head.weight"
        elif name not in ("output_layer.weight", "embedding.word_embeddings.weight"):
            raise KeyError(name)
        return part(self._padded(self.tensors[source]), 0, self.place.tp)

    def _padded(self, table: torch.Tensor) -> torch.Tensor:
        """Zero rows up to a multiple of TP."""
        missing = -table.shape[0] % self.place.tp[1]
        return torch.cat([table, table.new_zeros(missing, table.shape[1])])

    def _source(self, name: str, rows: int) -> torch.Tensor:
        """A tensor; zeros for a bias that the source has not."""
        if name in self.tensors:
            return self.tensors[name]
        assert name.endswith(".bias"), name
        return torch.zeros(rows)

    def _linear_qkv(self, prefix: str, kind: str) -> torch.Tensor:
        """Group after group: its query heads, its key head, its value head."""
        rows = {"q": self.heads * self.size, "k": self.groups * self.size, "v": self.groups * self.size}
        whole = {x: self._source(f"{prefix}self_attn.{x}_proj.{kind}", n) for x, n in rows.items()}
        out, per_group = [], self.heads // self.groups
        for group in range(self.groups):
            for head in range(group * per_group, (group + 1) * per_group):
                out.append(whole["q"][head * self.size : (head + 1) * self.size])
            out.append(whole["k"][group * self.size : (group + 1) * self.size])
            out.append(whole["v"][group * self.size : (group + 1) * self.size])
        return part(torch.cat(out), 0, self.place.tp)

    def _linear_fc1(self, prefix: str, kind: str) -> torch.Tensor:
        """This rank's gate rows, then this rank's up rows."""
        rows = self.config["intermediate_size"]
        halves = [self._source(f"{prefix}mlp.{half}_proj.{kind}", rows) for half in ("gate", "up")]
        return torch.cat([part(half, 0, self.place.tp) for half in halves])

    def _row_parallel(self, name: str, kind: str) -> torch.Tensor:
        """Columns of the weight; the whole bias."""
        tensor = self._source(f"{name}.{kind}", self.config["hidden_size"])
        return tensor if kind == "bias" else part(tensor, 1, self.place.tp)

    def _linear_proj(self, prefix: str, kind: str) -> torch.Tensor:
        return self._row_parallel(prefix + "self_attn.o_proj", kind)

    def _linear_fc2(self, prefix: str, kind: str) -> torch.Tensor:
        return self._row_parallel(prefix + "mlp.down_proj", kind)

    def _mixture(self, prefix: str, name: str) -> torch.Tensor:
        """Router, shared expert with its gate, and the experts of this rank, by any of megatron's two names."""
        if name == "mlp.router.weight":
            return self._either(prefix, "mlp.gate.weight", "block_sparse_moe.gate.weight")
        if name == "mlp.shared_experts.gate_weight":
            return self.tensors[prefix + "mlp.shared_expert_gate.weight"]
        if name.startswith("mlp.shared_experts."):
            return self._expert(prefix + "mlp.shared_expert.", ("gate_proj", "up_proj", "down_proj"), name, "tp")
        found = re.fullmatch(r"mlp\.experts\.(local_experts\.(\d+)\.)?linear_fc[12]\.weight(\d*)", name)
        assert found, name
        number = int(found[2] or found[3]) + self.place.ep[0] * self.experts // self.place.ep[1]
        if f"{prefix}block_sparse_moe.gate.weight" in self.tensors:
            return self._expert(f"{prefix}block_sparse_moe.experts.{number}.", ("w1", "w3", "w2"), name, "etp")
        return self._expert(f"{prefix}mlp.experts.{number}.", ("gate_proj", "up_proj", "down_proj"), name, "etp")

    def _either(self, prefix: str, *names: str) -> torch.Tensor:
        return next(self.tensors[prefix + name] for name in names if prefix + name in self.tensors)

    def _expert(self, prefix: str, names: tuple[str, str, str], wanted: str, axis: str) -> torch.Tensor:
        """A slice of one expert: its gate rows, then its up rows; or columns."""
        place = getattr(self.place, axis)
        gate, up, down = (self.tensors[f"{prefix}{name}.weight"] for name in names)
        if "linear_fc2" in wanted:
            return part(down, 1, place)
        return torch.cat([part(gate, 0, place), part(up, 0, place)])


def parameters(model: Any) -> list[tuple[str, int | None, torch.nn.Parameter]]:
    """(name within its layer, global layer or None, parameter) of a pipeline stage."""
    out: list[tuple[str, int | None, torch.nn.Parameter]] = []
    for name, parameter in model.named_parameters():
        if not name.startswith("decoder.layers."):
            out.append((name, None, parameter))
            continue
        index, inner = name[len("decoder.layers.") :].split(".", 1)
        out.append((inner, model.decoder.layers[int(index)].layer_number - 1, parameter))
    return out
