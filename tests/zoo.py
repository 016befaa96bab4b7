"""Tiny random models of every architecture, saved by transformers itself or named as the released files are.

Where the files that people download differ from what transformers writes, a documented function says so. Every
element of a tensor of up to 15,360 elements differs from the others, so an exchanged axis cannot hide.
"""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from zoo_numbers import Config, Tensors, in_fp8, in_mxfp4, near_one, numbers

Change = Callable[[Tensors, Config], Tensors]  # changes the config in place, returns the tensors

# 4 groups of 3 heads of 6 make q_proj and o_proj square; TP 2 cuts everything, the vocabulary unevenly.
BASE: Config = {
    "num_hidden_layers": 3, "hidden_size": 72, "num_attention_heads": 12, "num_key_value_heads": 4,
    "intermediate_size": 92, "vocab_size": 131, "max_position_embeddings": 128, "rms_norm_eps": 1e-5,
    "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None,
}  # fmt: skip
TIED, UNTIED = {"tie_word_embeddings": True}, {"tie_word_embeddings": False}
EXPERTS: Config = {"num_experts_per_tok": 2, "moe_intermediate_size": 72, "norm_topk_prob": True}
QWEN_EXPERTS: Config = {**EXPERTS, "num_experts": 4, "head_dim": 8}
MLA: Config = {
    **EXPERTS, "moe_intermediate_size": 46, "num_key_value_heads": 12, "kv_lora_rank": 34, "q_lora_rank": 22,
    "qk_nope_head_dim": 10, "qk_rope_head_dim": 4, "v_head_dim": 6, "n_routed_experts": 8, "n_shared_experts": 2,
    "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "first_k_dense_replace": 1,
}  # fmt: skip
# More than one block of 128 × 128 in every weight, the last ones partial; o_proj is square.
BLOCKS: Config = {
    **MLA, "num_hidden_layers": 2, "hidden_size": 144, "num_attention_heads": 8, "num_key_value_heads": 8,
    "intermediate_size": 150, "moe_intermediate_size": 130, "kv_lora_rank": 130, "q_lora_rank": 132,
    "qk_nope_head_dim": 12, "qk_rope_head_dim": 6, "v_head_dim": 18, "n_routed_experts": 2, "n_shared_experts": 1,
    "n_group": 2, "topk_group": 1, "num_experts_per_tok": 1, "vocab_size": 41,
}  # fmt: skip
GLM: Config = {
    **EXPERTS, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "attention_bias": True,
}  # fmt: skip
DOTS1: Config = {
    **EXPERTS, "head_dim": 8, "n_routed_experts": 4, "n_shared_experts": 2, "first_k_dense_replace": 1, "n_group": 2,
    "topk_group": 1, "routed_scaling_factor": 2.5, "sliding_window": 8, "max_window_layers": 3,
}  # fmt: skip
GPT_OSS: Config = {
    "hidden_size": 96, "intermediate_size": 96, "head_dim": 8, "num_local_experts": 4,
    "max_position_embeddings": 131072,
}  # fmt: skip
VISION: Config = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 20, "num_heads": 4, "patch_size": 4, "out_hidden_size": 72,
    "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
QWEN3_VISION: Config = {**VISION, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
SIGLIP: Config = {
    "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 2, "image_size": 16,
    "patch_size": 4, "vision_use_head": False,
}  # fmt: skip
MROPE: Config = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]}}
DELTA_NET: Config = {
    **QWEN_EXPERTS, "moe_intermediate_size": 46, "shared_expert_intermediate_size": 30, "linear_num_key_heads": 4,
    "linear_num_value_heads": 8, "linear_key_head_dim": 6, "linear_value_head_dim": 9,
}  # fmt: skip
LAYER_TYPES = ["linear_attention", "linear_attention", "linear_attention", "full_attention"]
MAMBA: Config = {
    **EXPERTS, "head_dim": 8, "mamba_num_heads": 6, "mamba_head_dim": 12, "n_groups": 2, "ssm_state_size": 14,
    "n_routed_experts": 4, "moe_shared_expert_intermediate_size": 50, "routed_scaling_factor": 2.5,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model: the transformers class that writes it and its config.

    changes: from what transformers writes to what the released files are. float32: names that those hold in float32.
    """

    writer: str
    model_type: str
    fields: Config
    changes: tuple[Change, ...] = ()
    float32: str = ""

    def but(self, *changes: Change, float32: str = "") -> Kind:
        """The same model with these changes."""
        return replace(self, changes=changes, float32=float32)


def text(name: str, model_type: str, fields: Config, **more: Any) -> Kind:
    """A text model: BASE and these fields."""
    return Kind(f"{name}ForCausalLM", model_type, {**BASE, **UNTIED, **fields, **more})


def seeing(name: str, model_type: str, fields: Config, vision: Config, **more: Any) -> Kind:
    """A model with a vision tower."""
    config = {"text_config": {**BASE, **fields}, "vision_config": vision, **UNTIED, **more}
    return Kind(f"{name}ForConditionalGeneration", model_type, config)


def _fields(**fields: Any) -> Change:
    """config.json with other fields."""
    return lambda tensors, config: config.update(fields) or tensors


def _released_rope(tensors: Tensors, config: Config) -> Tensors:
    """config.json as releases of transformers before 5 wrote it: rope_theta at the top, torch_dtype."""
    rope = config.pop("rope_parameters")
    config |= {"torch_dtype": config.pop("dtype"), "rope_theta": rope["rope_theta"], "rope_scaling": None}
    return tensors


def _renamed(old: str, new: str) -> Change:
    """Other names."""
    return lambda tensors, _: {re.sub(old, new, name): tensor for name, tensor in tensors.items()}


def _transposed_experts(tensors: Tensors, _: Config) -> Tensors:
    """Experts as Qwen3-VL-MoE's released files have them, [E, H, 2I] and [E, I, H]: transformers 5 turns them."""
    turned = re.compile(r".*\.experts\.(gate_up|down)_proj")
    return {n: t.transpose(1, 2).contiguous() if turned.fullmatch(n) else t for n, t in tensors.items()}


def _mtp_of_deepseek(tensors: Tensors, config: Config) -> Tensors:
    """The last layer made the one for multi-token prediction, as the released files of DeepSeek-V3 and GLM-4.5 name it.

    Its embedding and head are copies of the main ones. transformers drops all of it when loading.
    """
    config |= {"num_hidden_layers": config["num_hidden_layers"] - 1, "num_nextn_predict_layers": 1}
    place, hidden = f"model.layers.{config['num_hidden_layers']}.", config["hidden_size"]
    shapes = {"enorm": (hidden,), "hnorm": (hidden,), "eh_proj": (hidden, 2 * hidden), "shared_head.norm": (hidden,)}
    added = {f"{place}{name}.weight": numbers(shape, 11 + n) for n, (name, shape) in enumerate(shapes.items())}
    copies = {"embed_tokens.weight": "model.embed_tokens.weight", "shared_head.head.weight": "lm_head.weight"}
    return {**tensors, **added, **{place + name: tensors[main].clone() for name, main in copies.items()}}


def _mtp_of_qwen(tensors: Tensors, config: Config) -> Tensors:
    """The last layer made the one for multi-token prediction, as the released file of Qwen3-Next names it."""
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    config |= {"num_hidden_layers": last, "full_attention_interval": 4}
    del config["layer_types"]
    norms = ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
    shapes = {"fc": (hidden, 2 * hidden), **dict.fromkeys(norms, (hidden,))}
    added = {f"mtp.{name}.weight": numbers(shape, 21 + n) for n, (name, shape) in enumerate(shapes.items())}
    return {**_renamed(rf"model\.layers\.{last}\.", "mtp.layers.0.")(tensors, config), **added}


def _released_nemotron(tensors: Tensors, config: Config) -> Tensors:
    """config.json as NVIDIA writes it: one letter per layer; no fields of experts in models that have none."""
    letters = {"linear_attention": "M", "full_attention": "*", "mlp": "-", "moe": "E"}
    pattern = "".join(letters[name] for name in config.pop("layers_block_type"))
    config |= {"hybrid_override_pattern": pattern, "num_hidden_layers": len(pattern)}
    of_experts = r"moe_.*|n_(routed|shared)_experts|(n|topk)_group|.*topk_prob|.*_per_tok|routed_.*|mtp_.*|num_next.*"
    for name in [name for name in config if "E" not in pattern and re.fullmatch(of_experts, name)]:
        del config[name]
    return tensors


_KIMI = (_fields(architectures=["KimiK2ForCausalLM"], model_type="kimi_k2"), _released_rope)
_MTP = (_mtp_of_deepseek, _released_rope)
_BIAS = r".*e_score_correction_bias"
_QWEN_MTP: Config = {**DELTA_NET, "num_hidden_layers": 5, "layer_types": [*LAYER_TYPES, "full_attention"]}

KINDS: Mapping[str, Kind] = {
    "llama": text("Llama", "llama", {}),
    "llama-tied": text("Llama", "llama", TIED, num_key_value_heads=12),
    "llama-bias": text("Llama", "llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": text("Mistral", "mistral", {"head_dim": 8, "intermediate_size": 72, "sliding_window": 5}),
    "qwen2": text("Qwen2", "qwen2", {"intermediate_size": 72}).but(_released_rope),
    "qwen3": text("Qwen3", "qwen3", {"head_dim": 8, "intermediate_size": 72}),
    "qwen3-moe": text("Qwen3Moe", "qwen3_moe", QWEN_EXPERTS),
    "qwen3-moe-mixed": text("Qwen3Moe", "qwen3_moe", QWEN_EXPERTS, mlp_only_layers=[1]),
    "mixtral": text("Mixtral", "mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2}),
    "qwen2-moe": text("Qwen2Moe", "qwen2_moe", QWEN_EXPERTS, head_dim=6, shared_expert_intermediate_size=50),
    "olmoe": text("Olmoe", "olmoe", {"num_experts": 6, "num_experts_per_tok": 2, "intermediate_size": 46}),
    "deepseek-v2": text("DeepseekV2", "deepseek_v2", MLA, topk_method="group_limited_greedy"),
    "deepseek-v2-lite": text("DeepseekV2", "deepseek_v2", MLA, q_lora_rank=None, topk_method="greedy"),
    "deepseek-v3": text("DeepseekV3", "deepseek_v3", MLA),
    "deepseek-v3-mtp": text("DeepseekV3", "deepseek_v3", MLA, num_hidden_layers=4).but(*_MTP, float32=_BIAS),
    "kimi-k2": text("DeepseekV3", "deepseek_v3", MLA).but(*_KIMI, float32=_BIAS),
    "kimi-k2-released": text("DeepseekV3", "deepseek_v3", MLA).but(_fields(model_type="kimi_k2"), float32=_BIAS),
    "gpt-oss": text("GptOss", "gpt_oss", GPT_OSS, sliding_window=8),
    "gemma2": text("Gemma2", "gemma2", TIED, head_dim=6),
    "gemma3": text("Gemma3", "gemma3_text", TIED, head_dim=8, intermediate_size=72),
    "gemma3-vl": seeing("Gemma3", "gemma3", {"head_dim": 8}, SIGLIP, **TIED).but(
        _renamed(r"^vision_tower\.", "vision_tower.vision_model.")
    ),
    "gemma3-vl-resaved": seeing("Gemma3", "gemma3", {"head_dim": 8}, SIGLIP, **TIED),
    "glm4-moe": text("Glm4Moe", "glm4_moe", GLM, use_qk_norm=True),
    "glm4-moe-mtp": text("Glm4Moe", "glm4_moe", GLM, num_hidden_layers=4).but(*_MTP, float32=_BIAS),
    "dots1": text("Dots1", "dots1", DOTS1),
    "phi3": text("Phi3", "phi3", {}),
    "olmo2": text("Olmo2", "olmo2", {}),
    "olmo3": text("Olmo3", "olmo3", {}),
    "granite": text("Granite", "granite", TIED),
    "qwen2.5-vl": seeing("Qwen2_5_VL", "qwen2_5_vl", MROPE, VISION),
    "qwen2.5-vl-new": seeing("Qwen2_5_VL", "qwen2_5_vl", MROPE, VISION, **TIED).but(
        _renamed(r"^(model)\.", r"\1.language_model."), _renamed(r"^(visual)\.", r"model.\1.")
    ),
    "qwen3-vl": seeing("Qwen3VL", "qwen3_vl", {**MROPE, "head_dim": 8}, QWEN3_VISION, **TIED),
    "qwen3-vl-moe": seeing("Qwen3VLMoe", "qwen3_vl_moe", {**MROPE, **QWEN_EXPERTS}, QWEN3_VISION).but(
        _transposed_experts
    ),
    "qwen3-vl-moe-resaved": seeing("Qwen3VLMoe", "qwen3_vl_moe", {**MROPE, **QWEN_EXPERTS}, QWEN3_VISION),
    "qwen3-next": text("Qwen3Next", "qwen3_next", DELTA_NET, num_hidden_layers=4, layer_types=LAYER_TYPES),
    "qwen3-next-mtp": text("Qwen3Next", "qwen3_next", _QWEN_MTP).but(_mtp_of_qwen, _released_rope),
    "nemotron-h": text("NemotronH", "nemotron_h", MAMBA, hybrid_override_pattern="M-M*-").but(_released_nemotron),
    "nemotron-h-moe": text("NemotronH", "nemotron_h", MAMBA, hybrid_override_pattern="ME*M-E").but(
        _released_nemotron, float32=rf"{_BIAS}|.*\.(A_log|D)"
    ),
    "nemotron-h-resaved": text("NemotronH", "nemotron_h", MAMBA, hybrid_override_pattern="ME*"),
}  # fmt: skip
# Sources with quantised weights: see `save_fp8` and `save_mxfp4`.
FP8_KINDS: Mapping[str, Kind] = {
    "deepseek-v3-fp8": text("DeepseekV3", "deepseek_v3", BLOCKS, num_hidden_layers=3).but(*_MTP, float32=_BIAS),
    "kimi-k2-fp8": text("DeepseekV3", "deepseek_v3", BLOCKS).but(*_KIMI, float32=_BIAS),
}
MXFP4_KINDS: Mapping[str, Kind] = {"gpt-oss-mxfp4": KINDS["gpt-oss"]}
ALL_KINDS: Mapping[str, Kind] = {**KINDS, **FP8_KINDS, **MXFP4_KINDS}


def save(kind: str, directory: Path, *, shards: int = 2, seed: int = 7) -> Path:
    """Write a kind's model in bfloat16, in at least `shards` files. Returns `directory`."""
    model = _random_model(ALL_KINDS[kind], seed)
    size = sum(tensor.nbytes for tensor in model.state_dict().values())
    model.save_pretrained(directory, max_shard_size=size // shards - 1)
    for change in ALL_KINDS[kind].changes:
        changed(directory, change, shards)
    return directory


@torch.no_grad()
def _random_model(kind: Kind, seed: int) -> Any:
    """The model; everything that its files hold is random, buffers too."""
    import transformers

    config = transformers.AutoConfig.for_model(kind.model_type, **kind.fields)
    model = getattr(transformers, kind.writer)._from_config(config, dtype=torch.bfloat16)
    for number, (name, tensor) in enumerate(sorted(model.state_dict(keep_vars=True).items())):
        dtype = torch.float32 if re.fullmatch(kind.float32, name) else tensor.dtype
        tensor.data = numbers(tensor.shape, 1000 * seed + number, dtype)
        if name.endswith("linear_attn.norm.weight"):  # stored less 1, so near 1 as in trained models
            tensor.data = near_one(tensor.shape, number)
    model.tie_weights()
    return model


def read(directory: Path) -> Tensors:
    """Every tensor of a directory, in the order of its files."""
    files = (load_file(path) for path in sorted(directory.glob("*.safetensors")))
    return {name: tensor for file in files for name, tensor in file.items()}


def read_config(directory: Path) -> Config:
    """The parsed config.json."""
    config: Config = json.loads((directory / "config.json").read_text())
    return config


def changed(directory: Path, change: Change, shards: int = 2) -> None:
    """Change the tensors and the config of a saved model, in place."""
    config = read_config(directory)
    write(directory, change(read(directory), config), config, shards)


def write(directory: Path, tensors: Tensors, config: Config, shards: int = 2) -> Path:
    """Write a model as transformers does: files in the tensors' order, cut by size, and the index."""
    from huggingface_hub import split_torch_state_dict_into_shards

    directory.mkdir(parents=True, exist_ok=True)
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    limit = sum(tensor.nbytes for tensor in tensors.values()) // shards - 1
    split = split_torch_state_dict_into_shards(tensors, max_shard_size=limit)
    for file, names in split.filename_to_tensors.items():
        save_file({name: tensors[name].contiguous() for name in names}, directory / file, {"format": "pt"})
    index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
    for name, table in (("model.safetensors.index.json", index), ("config.json", config)):
        (directory / name).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    return directory


def save_fp8(kind: str, directory: Path) -> Path:
    """Write the model with the linears of its layers as random e4m3 codes and one float32 scale per 128 × 128 block."""
    changed(save(kind, directory), in_fp8)
    return directory


def save_mxfp4(kind: str, directory: Path) -> Path:
    """Write GPT-OSS with experts as the released files have them: random pairs of E2M1 codes and E8M0 scales.

    `_blocks` is [E, rows, columns / 32, 16] and `_scales` [E, rows, columns / 32]; the rows are the outputs.
    """
    changed(save(kind, directory), in_mxfp4)
    return directory


@cache
def _root() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="zoo-")


@cache
def made(kind: str) -> Path:
    """The model of a kind, made once and not to be changed."""
    write_kind = save_fp8 if kind in FP8_KINDS else save_mxfp4 if kind in MXFP4_KINDS else save
    return write_kind(kind, Path(_root().name) / kind)
