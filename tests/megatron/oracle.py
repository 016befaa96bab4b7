"""What each Megatron parameter must hold, cut naively out of the Hugging Face tensors.

Written from the format's description alone; shares no code with the converter.
"""

from __future__ import annotations

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


class Oracle:
    """The expected parameter of a TP rank."""

    def __init__(self, directory: Path | str, config: dict[str, Any], tp: int) -> None:
        self.tensors, self.config, self.tp = read_tensors(directory), config, tp
        self.heads = config["num_attention_heads"]
        self.groups = config.get("num_key_value_heads") or self.heads
        self.size = config.get("head_dim") or config["hidden_size"] // self.heads

    def expected(self, name: str, layer: int | None, rank: int) -> torch.Tensor:
        """The value of parameter `name` (without `decoder.layers.N.`) of global `layer` on TP rank `rank`."""
        if layer is None:
            return self._outer(name, rank)
        prefix = f"model.layers.{layer}."
        if name in NORMS:
            return self.tensors[prefix + NORMS[name]]
        module, kind = name.rsplit(".", 1)
        return getattr(self, "_" + module.rsplit(".", 1)[1])(prefix, kind, rank)

    def _outer(self, name: str, rank: int) -> torch.Tensor:
        """Embedding, output layer and final norm."""
        if name == "decoder.final_layernorm.weight":
            return self.tensors["model.norm.weight"]
        source = "model.embed_tokens.weight"
        if name == "output_layer.weight" and not self.config["tie_word_embeddings"]:
            source = "lm_head.weight"
        elif name not in ("output_layer.weight", "embedding.word_embeddings.weight"):
            raise KeyError(name)
        return self._padded(self.tensors[source]).chunk(self.tp, dim=0)[rank]

    def _padded(self, table: torch.Tensor) -> torch.Tensor:
        """Zero rows up to a multiple of TP."""
        missing = -table.shape[0] % self.tp
        return torch.cat([table, table.new_zeros(missing, table.shape[1])])

    def _source(self, name: str, rows: int) -> torch.Tensor:
        """A tensor; zeros for a bias that the source has not."""
        if name in self.tensors:
            return self.tensors[name]
        assert name.endswith(".bias"), name
        return torch.zeros(rows)

    def _linear_qkv(self, prefix: str, kind: str, rank: int) -> torch.Tensor:
        """Group after group: its query heads, its key head, its value head."""
        rows = {"q": self.heads * self.size, "k": self.groups * self.size, "v": self.groups * self.size}
        part = {x: self._source(f"{prefix}self_attn.{x}_proj.{kind}", n) for x, n in rows.items()}
        out, per_group = [], self.heads // self.groups
        for group in range(self.groups):
            for head in range(group * per_group, (group + 1) * per_group):
                out.append(part["q"][head * self.size : (head + 1) * self.size])
            out.append(part["k"][group * self.size : (group + 1) * self.size])
            out.append(part["v"][group * self.size : (group + 1) * self.size])
        whole = torch.cat(out)
        step = whole.shape[0] // self.tp
        return whole[rank * step : (rank + 1) * step]

    def _linear_fc1(self, prefix: str, kind: str, rank: int) -> torch.Tensor:
        """This rank's gate rows, then this rank's up rows."""
        rows = self.config["intermediate_size"]
        step = rows // self.tp
        halves = [self._source(f"{prefix}mlp.{half}_proj.{kind}", rows) for half in ("gate", "up")]
        return torch.cat([half[rank * step : (rank + 1) * step] for half in halves])

    def _row_parallel(self, name: str, kind: str, rank: int) -> torch.Tensor:
        """Columns of the weight; the whole bias."""
        tensor = self._source(f"{name}.{kind}", self.config["hidden_size"])
        if kind == "bias":
            return tensor
        step = tensor.shape[1] // self.tp
        return tensor[:, rank * step : (rank + 1) * step]

    def _linear_proj(self, prefix: str, kind: str, rank: int) -> torch.Tensor:
        return self._row_parallel(prefix + "self_attn.o_proj", kind, rank)

    def _linear_fc2(self, prefix: str, kind: str, rank: int) -> torch.Tensor:
        return self._row_parallel(prefix + "mlp.down_proj", kind, rank)


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
