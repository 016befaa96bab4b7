"""What each Megatron tensor of a model must hold, spelled out from the formats' description alone, without a recipe."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import torch
from torch.distributed import checkpoint as dcp
from zoo import Config, Tensors, made, read, read_config

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
MLA = {
    "q_proj": "linear_q_proj.weight", "q_a_proj": "linear_q_down_proj.weight", "q_b_proj": "linear_q_up_proj.weight",
    "q_a_layernorm": "linear_q_up_proj.layer_norm_weight", "kv_a_proj_with_mqa": "linear_kv_down_proj.weight",
    "kv_b_proj": "linear_kv_up_proj.weight", "kv_a_layernorm": "linear_kv_up_proj.layer_norm_weight",
    "o_proj": "linear_proj.weight",
}  # fmt: skip
MTP_NAMES = {
    "enorm": ("enorm", "pre_fc_norm_embedding"), "hnorm": ("hnorm", "pre_fc_norm_hidden"), "eh_proj": ("eh_proj", "fc"),
    "final_layernorm": ("shared_head.norm", "norm"),
}  # fmt: skip


class Naive:
    """The Megatron tensors of a model, per layer and whole: `out`. Takes every Hugging Face tensor exactly once."""

    def __init__(self, tensors: Tensors, config: Config) -> None:
        self.left, self.out = dict(tensors), Tensors()
        self.config: Config = {**config, **config.get("text_config", {})}
        self.heads: int = self.config["num_attention_heads"]
        self.groups: int = self.config["num_key_value_heads"]
        embedding = min((n for n in tensors if re.search(r"(^|\.)(embed_tokens|embeddings)\.weight$", n)), key=len)
        prefix, self.inside = embedding.rsplit(".", 2)[0] + ".", ("vision_config" in config and "language_model.") or ""
        self.move(embedding, f"{self.inside}embedding.word_embeddings.weight")
        self.move("lm_head.weight", f"{self.inside}output_layer.weight")
        self.move(f"{prefix}norm.weight", f"{self.inside}decoder.final_layernorm.weight")
        self.move(f"{prefix}norm_f.weight", f"{self.inside}decoder.final_norm.weight")
        for layer in range(self.layers()):
            self.layer(f"{prefix}layers.{layer}.", f"{self.inside}decoder.layers.{layer}.")
        self.prediction(f"{prefix}layers.{self.layers()}.")
        self.tower()
        assert not self.left

    def layers(self) -> int:
        return self.config.get("num_hidden_layers") or len(self.config["layers_block_type"])

    def take(self, name: str) -> torch.Tensor:
        return self.left.pop(name)

    def move(self, name: str, key: str) -> None:
        """A copy, where there is such a tensor."""
        if name in self.left:
            self.out[key] = self.take(name)

    def both(self, name: str, key: str) -> None:
        """Weight and bias."""
        for part in ("weight", "bias"):
            self.move(f"{name}.{part}", f"{key}.{part}")

    def layer(self, h: str, d: str) -> None:
        if f"{h}norm.weight" in self.left:
            return self.hybrid(h, d)
        self.attention(f"{h}self_attn.", h, d)
        self.feed_forward(h, d)
        return None

    def attention(self, a: str, h: str, d: str) -> None:
        s = f"{d}self_attention."
        if f"{a}kv_b_proj.weight" in self.left:
            for name, key in MLA.items():
                self.move(f"{a}{name}.weight", s + key)
            self.move(f"{h}input_layernorm.weight", f"{d}input_layernorm.weight")
        elif f"{h}linear_attn.A_log" in self.left:
            self.delta_net(f"{h}linear_attn.", s)
            self.move(f"{h}input_layernorm.weight", f"{s}in_proj.layer_norm_weight")
        else:
            self.heads_of(a, s)
            self.move(f"{h}input_layernorm.weight", f"{s}linear_qkv.layer_norm_weight")

    def heads_of(self, a: str, s: str) -> None:
        """Group after group: its query heads, their gates if any, its key head, its value head."""
        for part in [part for part in ("weight", "bias") if f"{a}v_proj.{part}" in self.left]:
            whole = [self.take(f"{a}{name}_proj.{part}") for name in "qkv"]
            self.out[f"{s}linear_qkv.{part}"] = self.grouped(*whole)
        if f"{a}qkv_proj.weight" in self.left:
            whole = self.take(f"{a}qkv_proj.weight")
            size = whole.shape[0] // (self.heads + 2 * self.groups)
            rows = [self.heads * size, self.groups * size, self.groups * size]
            self.out[f"{s}linear_qkv.weight"] = self.grouped(*whole.split(rows))
        self.both(f"{a}o_proj", f"{s}linear_proj")
        for name in ("q", "k"):
            self.move(f"{a}{name}_norm.weight", f"{s}{name}_layernorm.weight")
        self.move(f"{a}sinks", f"{s}core_attention.softmax_offset")

    def grouped(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        per_group, rows = self.heads // self.groups, []
        queries, gated = query.chunk(self.heads), len(query) * self.groups == 2 * len(key) * self.heads
        for group, (k, v) in enumerate(zip(key.chunk(self.groups), value.chunk(self.groups), strict=True)):
            mine = queries[group * per_group : (group + 1) * per_group]
            parts = [head.chunk(2) for head in mine] if gated else [(head,) for head in mine]
            rows += [part[which] for which in range(1 + gated) for part in parts] + [k, v]
        return torch.cat(rows)

    def delta_net(self, a: str, s: str) -> None:
        """Rows of every key head's group, sorted into sections; the output norm is stored less 1."""
        c = self.config
        groups, per_group = c["linear_num_key_heads"], c["linear_num_value_heads"] // c["linear_num_key_heads"]
        k, v = c["linear_key_head_dim"], c["linear_value_head_dim"] * per_group
        for name, sizes, names in (
            ("in_proj_qkvz", (k, k, v, v), ("query", "key", "value", "z")),
            ("in_proj_ba", (per_group, per_group), ("beta", "alpha")),
        ):
            pieces = [part.split(sizes) for part in self.take(f"{a}{name}.weight").chunk(groups)]
            for number, section in enumerate(names):
                self.out[f"{s}in_proj.weight.{section}"] = torch.cat([piece[number] for piece in pieces])
        self.sections(f"{a}conv1d.weight", f"{s}conv1d.weight", query=k * groups, key=k * groups, value=v * groups)
        self.out[f"{s}out_norm.weight"] = (self.take(f"{a}norm.weight").double() - 1).bfloat16()
        for name in ("A_log", "dt_bias", "out_proj.weight"):
            self.move(a + name, s + name)

    def sections(self, name: str, stored: str, **sizes: int) -> None:
        for section, part in zip(sizes, self.take(name).split([*sizes.values()]), strict=True):
            self.out[f"{stored}.{section}"] = part

    def hybrid(self, h: str, d: str) -> None:
        """A layer of Nemotron-H: one mixer behind one norm."""
        m, c = f"{h}mixer.", self.config
        if f"{m}A_log" in self.left:
            inner, state = c["mamba_num_heads"] * c["mamba_head_dim"], c["n_groups"] * c["ssm_state_size"]
            conv = {"x": inner, "B": state, "C": state}
            key = f"{d}mixer.in_proj"
            self.sections(f"{m}in_proj.weight", f"{key}.weight", z=inner, **conv, dt=c["mamba_num_heads"])
            for part in ("weight", "bias"):
                self.sections(f"{m}conv1d.{part}", f"{d}mixer.conv1d.{part}", **conv)
            for name in ("A_log", "D", "dt_bias", "norm.weight", "out_proj.weight"):
                self.move(m + name, f"{d}mixer.{name}")
        elif f"{m}q_proj.weight" in self.left:
            self.heads_of(m, f"{d}self_attention.")
            key = f"{d}self_attention.linear_qkv"
        else:
            key = f"{d}mlp.linear_fc1" if f"{m}up_proj.weight" in self.left else ""
            self.mixture(m, f"{d}mlp.") if not key else self.projections(m, f"{d}mlp.linear_")
        self.move(f"{h}norm.weight", f"{key}.layer_norm_weight" if key else f"{d}pre_mlp_layernorm.weight")

    def feed_forward(self, h: str, d: str) -> None:
        sparse = any(re.match(rf"{re.escape(h)}\w+\.experts\.", name) for name in self.left)
        before = f"{d}pre_mlp_layernorm.weight" if sparse else f"{d}mlp.linear_fc1.layer_norm_weight"
        if f"{h}post_feedforward_layernorm.weight" in self.left:
            self.move(f"{h}pre_feedforward_layernorm.weight", before)
            self.move(f"{h}post_feedforward_layernorm.weight", f"{d}mlp.linear_fc2.post_layernorm.weight")
            before = f"{d}self_attention.linear_proj.post_layernorm.weight"
        self.move(f"{h}post_attention_layernorm.weight", before)
        if sparse:
            self.mixture(f"{h}mlp.", f"{d}mlp.")
            self.mixture(f"{h}block_sparse_moe.", f"{d}mlp.")
        else:
            self.projections(f"{h}mlp.", f"{d}mlp.linear_")

    def projections(self, m: str, key: str) -> None:
        """Gate rows, then up rows; or up rows alone; or rows that the file has joined already."""
        for part in ("weight", "bias"):
            names = [f"{m}{name}.{part}" for name in ("gate_proj", "up_proj", "w1", "w3", "gate_up_proj")]
            if found := [self.take(name) for name in names if name in self.left]:
                self.out[f"{key}fc1.{part}"] = torch.cat(found)
        self.both(f"{m}down_proj", f"{key}fc2")
        self.both(f"{m}w2", f"{key}fc2")

    def mixture(self, m: str, d: str) -> None:
        self.both(f"{m}gate", f"{d}router")
        self.both(f"{m}router", f"{d}router")
        self.move(f"{m}gate.e_score_correction_bias", f"{d}router.expert_bias")
        self.projections(f"{m}shared_experts.", f"{d}shared_experts.linear_")
        self.projections(f"{m}shared_expert.", f"{d}shared_experts.linear_")
        self.move(f"{m}shared_expert_gate.weight", f"{d}shared_experts.gate_weight")
        one = Tensors()
        for number in range(sum(bool(re.match(rf"{re.escape(m)}experts\.\d+\.(down_proj|w2)", n)) for n in self.left)):
            self.projections(f"{m}experts.{number}.", f"{d}experts.experts.linear_")
            for key in [key for key in self.out if key.startswith(f"{d}experts.experts.")]:
                one[key] = torch.cat([one[key], self.out[key][None]]) if key in one else self.out[key][None]
                del self.out[key]
        self.out |= one
        if f"{m}experts.down_proj" in self.left:
            self.fused(f"{m}experts.", f"{d}experts.experts.linear_")

    def fused(self, m: str, key: str) -> None:
        """All experts in one tensor: output-major where it is gate and up in halves, unless the file is older."""
        first, second = self.take(f"{m}gate_up_proj"), self.take(f"{m}down_proj")
        alternating = f"{m}gate_up_proj_bias" in self.left
        if alternating or first.shape[1] == self.config["hidden_size"]:
            first, second = first.transpose(1, 2), second.transpose(1, 2)
        self.out |= {f"{key}fc1.weight": _halves(first) if alternating else first, f"{key}fc2.weight": second}
        if alternating:
            self.out[f"{key}fc1.bias"] = _halves(self.take(f"{m}gate_up_proj_bias"))
            self.move(f"{m}down_proj_bias", f"{key}fc2.bias")

    def prediction(self, h: str) -> None:
        """The layer of multi-token prediction, by either name; what it repeats is not stored."""
        for copy, main in (("embed_tokens", "embedding.word_embeddings"), ("shared_head.head", "output_layer")):
            assert f"{h}{copy}.weight" not in self.left or torch.equal(
                self.take(f"{h}{copy}.weight"), self.out[f"{main}.weight"]
            )
        for key, names in MTP_NAMES.items():
            self.move(f"{h}{names[0]}.weight", f"mtp.layers.0.{key}.weight")
            self.move(f"mtp.{names[1]}.weight", f"mtp.layers.0.{key}.weight")
        for start in [start for start in (h, "mtp.layers.0.") if f"{start}input_layernorm.weight" in self.left]:
            self.layer(start, "mtp.layers.0.transformer_layer.")

    def tower(self) -> None:
        """A vision tower under its own names, or Qwen3-VL's as a Megatron model."""
        for name in list(self.left):
            key = re.sub(r"^model\.visual\.", "visual.", name).replace("vision_tower.vision_model.", "vision_tower.")
            tensor = self.take(name)
            if name.startswith("model.visual.") and "deepstack_visual_indexes" in self.config["vision_config"]:
                key, tensor = _qwen3_vision(key, tensor, self.config["vision_config"]["num_heads"])
            elif key.endswith("mm_input_projection_weight"):
                key, tensor = key.replace("mm_input_projection_weight", "proj.weight"), tensor.T
            self.out[key.replace("mm_soft_emb_norm", "mm_soft_embed_norm")] = tensor


def _halves(rows: torch.Tensor) -> torch.Tensor:
    """Alternating gate and up rows of every expert as halves."""
    return torch.cat([rows[:, 0::2], rows[:, 1::2]], 1)


def _qwen3_vision(key: str, tensor: torch.Tensor, heads: int) -> tuple[str, torch.Tensor]:
    for old, new in (
        (r"visual\.", "vision_model."), (r"blocks\.", "decoder.layers."), (r"deepstack_", "decoder.deepstack_"),
        (r"attn\.qkv", "self_attention.linear_qkv"), (r"attn\.proj", "self_attention.linear_proj"),
        (r"norm1\.", "self_attention.linear_qkv.layer_norm_"), (r"norm2\.", "mlp.linear_fc1.layer_norm_"),
        (r"\.norm\.", ".patch_norm."),
    ):  # fmt: skip
        key = re.sub(old, new, key)
    if "linear_qkv.weight" in key or "linear_qkv.bias" in key:
        parts = [part.chunk(heads) for part in tensor.chunk(3)]
        tensor = torch.cat([part[head] for head in range(heads) for part in parts])
    return key, tensor


@cache
def expected(kind: str) -> Tensors:
    """The Megatron tensors of a kind, with a number for every layer."""
    directory = made(kind)
    return Naive(decoded(read(directory)), read_config(directory)).out


def decoded(tensors: Tensors) -> Tensors:
    """The weights behind FP8 and MXFP4 numbers and their scales, in bfloat16; other tensors as they are."""
    found = Tensors()
    for name, tensor in tensors.items():
        if f"{name}_scale_inv" in tensors:
            spread = tensors[f"{name}_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
            found[name] = (tensor.float() * spread[: tensor.shape[0], : tensor.shape[1]]).bfloat16()
        elif name.endswith("_blocks"):
            values = torch.stack([E2M1[tensor.long() & 15], E2M1[tensor.long() >> 4]], -1).flatten(-2)
            scales = torch.exp2(tensors[name.replace("_blocks", "_scales")].float() - 127)
            found[name.removesuffix("_blocks")] = (values * scales[..., None]).flatten(-2).transpose(1, 2).bfloat16()
        elif not name.endswith(("_scale_inv", "_scales")):
            found[name] = tensor
    return found


def alike(kind: str) -> bool:
    """Whether all layers of the decoder have the same tensors."""
    numbered = [re.fullmatch(r"(?:language_model\.)?decoder\.layers\.(\d+)\.(.*)", key) for key in expected(kind)]
    names = {match[1]: set[str]() for match in numbered if match}
    for match in filter(None, numbered):
        names[match[1]].add(match[2])
    return len({frozenset(each) for each in names.values()}) == 1


def stacked(tensors: Tensors) -> Tensors:
    """All layers of each stack in one tensor; layers of multi-token prediction stay apart."""
    rows: dict[str, list[torch.Tensor]] = {}
    for key, tensor in tensors.items():
        new = re.sub(r"(decoder\.layers|deepstack_merger_list)\.\d+\.", r"\1.", key)
        rows.setdefault(new, []).append(tensor if new == key else tensor[None])
    return {key: torch.cat(parts) for key, parts in rows.items()}


def loaded(checkpoint: Path) -> Tensors:
    """Every tensor of a checkpoint, read by torch."""
    reader = dcp.FileSystemReader(checkpoint / "iter_0000000")
    rows = reader.read_metadata().state_dict_metadata.items()
    found = {key: torch.empty(row.size, dtype=row.properties.dtype) for key, row in rows if hasattr(row, "properties")}
    dcp.load(found, storage_reader=reader)
    return found
