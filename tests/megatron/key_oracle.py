"""What each parameter of a model beyond plain attention must hold, cut out of the Hugging Face tensors with torch.

Written from the description of both layouts alone; shares no code with the converter.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from oracle import Place, part, read_tensors

Config = dict[str, Any]

# Megatron's name → Hugging Face's, within a layer, for what is neither cut nor changed. `A.` attention, `M.` the other.
WHOLE = {
    "input_layernorm.weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.in_proj.layer_norm_weight": "input_layernorm.weight",
    "mixer.in_proj.layer_norm_weight": "input_layernorm.weight",
    "pre_mlp_layernorm.weight": "post_attention_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "self_attention.q_layernorm.weight": "A.q_norm.weight",
    "self_attention.k_layernorm.weight": "A.k_norm.weight",
    "self_attention.linear_proj.bias": "A.o_proj.bias",
    "self_attention.linear_q_down_proj.weight": "A.q_a_proj.weight",
    "self_attention.linear_q_up_proj.layer_norm_weight": "A.q_a_layernorm.weight",
    "self_attention.linear_kv_down_proj.weight": "A.kv_a_proj_with_mqa.weight",
    "self_attention.linear_kv_up_proj.layer_norm_weight": "A.kv_a_layernorm.weight",
    "mlp.router.weight": "M.gate.weight",
    "mlp.router.expert_bias": "M.gate.e_score_correction_bias",
    "mlp.shared_experts.gate_weight": "M.shared_expert_gate.weight",
}
# The same for what tensor parallelism cuts: the name and the axis.
CUT = {
    "self_attention.linear_proj.weight": ("A.o_proj.weight", 1),
    "self_attention.linear_q_proj.weight": ("A.q_proj.weight", 0),
    "self_attention.linear_q_up_proj.weight": ("A.q_b_proj.weight", 0),
    "self_attention.linear_kv_up_proj.weight": ("A.kv_b_proj.weight", 0),
    "self_attention.core_attention.softmax_offset": ("A.sinks", 0),
    "self_attention.A_log": ("linear_attn.A_log", 0),
    "self_attention.dt_bias": ("linear_attn.dt_bias", 0),
    "self_attention.out_proj.weight": ("linear_attn.out_proj.weight", 1),
    "mlp.linear_fc2.weight": ("M.down_proj.weight", 1),
    **{f"mixer.{name}": (f"mixer.{name}", 0) for name in ("A_log", "D", "dt_bias", "norm.weight")},
    "mixer.out_proj.weight": ("mixer.out_proj.weight", 1),
}
MTP = {  # DeepSeek's and GLM's names, Qwen's
    "enorm.weight": ("enorm.weight", "mtp.pre_fc_norm_embedding.weight"),
    "hnorm.weight": ("hnorm.weight", "mtp.pre_fc_norm_hidden.weight"),
    "eh_proj.weight": ("eh_proj.weight", "mtp.fc.weight"),
    "final_layernorm.weight": ("shared_head.norm.weight", "mtp.norm.weight"),
}
PER_EXPERT = re.compile(r"mlp\.experts\.linear_fc([12])\.(weight|bias)(\d+)")
SHARED = re.compile(r"mlp\.shared_experts\.linear_fc([12])\.weight")


class KeyOracle:
    """The expected parameters and buffers of one rank. rows: of the embedding, padding included."""

    def __init__(self, directory: Path | str, config: Config, place: Place, rows: int) -> None:
        self.tensors, self.config, self.place, self.rows = read_tensors(directory), config, place, rows
        self.nemotron = config["model_type"] == "nemotron_h"

    def expected(self, name: str) -> torch.Tensor:
        """The value of a parameter or buffer by megatron's name."""
        layer = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
        if layer:
            root = "backbone" if self.nemotron else "model"
            return self._inner(f"{root}.layers.{layer[1]}.", layer[2])
        layer = re.fullmatch(r"mtp\.layers\.(\d+)\.(?:transformer_layer\.)?(.+)", name)
        return self._predicted(int(layer[1]), layer[2]) if layer else self._outer(name)

    def _outer(self, name: str) -> torch.Tensor:
        """Embedding, output layer and final norm."""
        inside = ("backbone.embeddings", "backbone.norm_f") if self.nemotron else ("model.embed_tokens", "model.norm")
        if name in ("decoder.final_layernorm.weight", "decoder.final_norm.weight"):
            return self.tensors[f"{inside[1]}.weight"]
        sources = {"embedding.word_embeddings.weight": inside[0], "output_layer.weight": "lm_head"}
        table = self.tensors[f"{sources[name]}.weight"]
        padding = table.new_zeros(self.rows - table.shape[0], table.shape[1])
        return self._part(torch.cat([table, padding]), 0)

    def _predicted(self, number: int, name: str) -> torch.Tensor:
        """A parameter of a layer for multi-token prediction."""
        deepseek = f"model.layers.{self.config['num_hidden_layers'] + number}."
        if name not in MTP:
            qwen = f"mtp.layers.{number}."
            return self._inner(qwen if "mtp.fc.weight" in self.tensors else deepseek, name)
        tensor = self._first(deepseek + MTP[name][0], MTP[name][1])
        return self._part(tensor, 0) if name == "eh_proj.weight" else tensor

    def _first(self, *names: str) -> torch.Tensor:
        return next(self.tensors[name] for name in names if name in self.tensors)

    def _part(self, tensor: torch.Tensor, axis: int, by: str = "tp") -> torch.Tensor:
        return part(tensor, axis, getattr(self.place, by))

    def _path(self, layer: str, name: str) -> str:
        """The whole Hugging Face name."""
        if self.nemotron:
            norm = "layernorm" in name and not name.startswith(("A.", "M."))
            return layer + ("norm.weight" if norm else re.sub(r"^[AM]\.", "mixer.", name))
        return layer + name.replace("A.", "self_attn.", 1).replace("M.", "mlp.", 1) if name[1] == "." else layer + name

    def _get(self, layer: str, name: str) -> torch.Tensor:
        return self.tensors[self._path(layer, name)]

    def _inner(self, layer: str, name: str) -> torch.Tensor:
        """A parameter of a layer."""
        if self.config["model_type"] == "gpt_oss" and name.startswith("mlp."):
            return self._gpt_oss(f"{layer}mlp.", name)
        if name in WHOLE:
            return self._get(layer, WHOLE[name])
        if name in CUT:
            return self._part(self._get(layer, CUT[name][0]), CUT[name][1])
        return self._made(layer, name)

    def _made(self, layer: str, name: str) -> torch.Tensor:
        """What is made of several tensors or in another order."""
        if name.startswith("self_attention.linear_qkv."):
            return self._qkv(layer, name.rsplit(".", 1)[1])
        if name == "mlp.linear_fc1.weight":
            return self._up(layer, "M.", "tp")
        shared, expert = SHARED.fullmatch(name), PER_EXPERT.fullmatch(name)
        if shared:
            several = self._path(layer, "M.shared_experts.up_proj.weight") in self.tensors
            return self._fc(layer, "M.shared_experts." if several else "M.shared_expert.", shared[1], "tp")
        if expert:
            return self._fc(layer, f"M.experts.{self._number(int(expert[3]))}.", expert[1], "etp")
        block = self._mamba if name.startswith("mixer.") else self._delta_net
        return block(layer, name.split(".", 1)[1])

    def _number(self, local: int) -> int:
        """An expert's number among all ranks' experts."""
        names = ("n_routed_experts", "num_experts", "num_local_experts")
        count = next(self.config[name] for name in names if name in self.config)
        return local + self.place.ep[0] * count // self.place.ep[1]

    def _fc(self, layer: str, prefix: str, which: str, by: str) -> torch.Tensor:
        if which == "2":
            return self._part(self._get(layer, f"{prefix}down_proj.weight"), 1, by)
        return self._up(layer, prefix, by)

    def _up(self, layer: str, prefix: str, by: str) -> torch.Tensor:
        """This rank's gate rows, then its up rows; Nemotron has no gate."""
        halves = ("up",) if self.nemotron else ("gate", "up")
        return torch.cat([self._part(self._get(layer, f"{prefix}{half}_proj.weight"), 0, by) for half in halves])

    def _qkv(self, layer: str, kind: str) -> torch.Tensor:
        """Group after group: query heads, the heads' gates where there are some, key head, value head."""
        config = self.config
        heads, groups = config["num_attention_heads"], config["num_key_value_heads"]
        size = config.get("head_dim") or config["hidden_size"] // heads
        q, k, v = (self._get(layer, f"A.{x}_proj.{kind}") for x in "qkv")
        rest = q.shape[1:]
        per_head = q.reshape(groups, heads // groups, -1, size, *rest)  # group, head, query and gate, row
        queries = [per_head[:, :, n].reshape(groups, -1, *rest) for n in range(per_head.shape[2])]
        key_value = [x.reshape(groups, size, *rest) for x in (k, v)]
        return self._part(torch.cat([*queries, *key_value], dim=1).reshape(-1, *rest), 0)

    def _sections(self, sections: list[torch.Tensor]) -> torch.Tensor:
        """This rank's rows of each section."""
        return torch.cat([self._part(section, 0) for section in sections])

    def _delta_net(self, layer: str, name: str) -> torch.Tensor:
        """Gated DeltaNet: query, key, value, z, beta, alpha; Qwen3-Next's file has them key head after key head."""
        config, prefix = self.config, "linear_attn."
        if name == "out_norm.weight":  # zero-centred in Megatron only
            return self._get(layer, f"{prefix}norm.weight") - 1
        keys, values = config["linear_num_key_heads"], config["linear_num_value_heads"]
        key_rows, value_rows = config["linear_key_head_dim"], config["linear_value_head_dim"] * values // keys
        if name == "conv1d.weight":
            sizes = [keys * key_rows, keys * key_rows, keys * value_rows]
            return self._sections(list(self._get(layer, f"{prefix}conv1d.weight").split(sizes)))
        assert name == "in_proj.weight", name
        wide, narrow = (self._get(layer, f"{prefix}in_proj_{x}.weight") for x in ("qkvz", "ba"))
        width = wide.shape[1]
        parts = wide.view(keys, -1, width).split([key_rows, key_rows, value_rows, value_rows], dim=1)
        gates = narrow.view(keys, -1, width).split(values // keys, dim=1)
        return self._sections([section.reshape(-1, width) for section in (*parts, *gates)])

    def _mamba(self, layer: str, name: str) -> torch.Tensor:
        """Mamba-2: z, x, B, C, dt in the projection, x, B, C in the convolution."""
        config = self.config
        inner, state = (
            config["mamba_num_heads"] * config["mamba_head_dim"],
            config["n_groups"] * config["ssm_state_size"],
        )
        sizes = [inner, state, state]
        if name == "in_proj.weight":
            sizes = [inner, *sizes, config["mamba_num_heads"]]
        return self._sections(list(self._get(layer, f"mixer.{name}").split(sizes)))

    def _gpt_oss(self, prefix: str, name: str) -> torch.Tensor:
        """Experts in one tensor, [expert, in, out], gate and up alternating in the last dimension; biases too."""
        router = {"mlp.router.weight": "router.weight", "mlp.router.bias": "router.bias"}
        expert = PER_EXPERT.fullmatch(name)
        if name == "pre_mlp_layernorm.weight" or not expert:
            return self.tensors[prefix + router[name]]
        bias = "_bias" if expert[2] == "bias" else ""
        source = "gate_up_proj" if expert[1] == "1" else "down_proj"
        tensor = self.tensors[f"{prefix}experts.{source}{bias}"][self._number(int(expert[3]))]
        tensor = tensor if bias else tensor.T
        return torch.cat([tensor[0::2], tensor[1::2]]) if expert[1] == "1" else tensor
