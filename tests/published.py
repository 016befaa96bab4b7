"""Published models as their files are: configurations, names, dtypes and shapes, and what the hub says about them.

`published/*.json` are the released `config.json` files. The names follow the released indexes and modelling code, never
`transcoder/recipes`: they are the other side of the comparison.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

CONFIGS = Path(__file__).parent / "published"
BYTES = {"BF16": 2, "F32": 4, "F8_E4M3": 1, "U8": 1}
BLOCK = 128  # rows and columns of one FP8 scale
Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype as safetensors spells it, shape
Config = Mapping[str, Any]


@dataclass(frozen=True)
class Release:
    """What is published about a model's files.

    parameters: of the weights, packed ones unpacked, scales and buffers left out. elements: per dtype, as stored.
    shards: how many files; shard: their names; first: the number of the first.
    """

    tensors: int
    parameters: int
    elements: Mapping[str, int]
    shards: int
    shard: str = "model-{:05d}-of-{:05d}.safetensors"
    first: int = 1

    @property
    def size(self) -> int:
        """Bytes of all payloads: `total_size` of the index, where it has one."""
        return sum(BYTES[dtype] * count for dtype, count in self.elements.items())

    @property
    def files(self) -> list[str]:
        """The names of the files."""
        last = self.shards - 1 + self.first
        return [self.shard.format(number, last) for number in range(self.first, last + 1)]


# Sources: `safetensors.parameters` of huggingface.co/api/models/NAME (elements), model.safetensors.index.json (tensors,
# shards, total_size) and public inventories of the headers of DeepSeek-R1 (V3's files but for the values), of
# Kimi-K2-Instruct and of gpt-oss-20b, with every name, dtype and shape. The hub counts a packed byte of MXFP4 as two
# elements; here it is one. gpt-oss-20b-BF16 is unsloth's copy, decoded and transposed.
RELEASES = {
    "Qwen3-30B-A3B": Release(18_867, 30_532_122_624, {"BF16": 30_532_122_624}, 16),
    "Qwen3-235B-A22B": Release(36_945, 235_093_634_560, {"BF16": 235_093_634_560}, 118),
    "Mixtral-8x7B-v0.1": Release(995, 46_702_792_704, {"BF16": 46_702_792_704}, 19),
    "DeepSeek-V3": Release(
        91_991,
        684_489_845_504,
        {"F8_E4M3": 680_571_043_840, "BF16": 3_918_786_560, "F32": 41_555_600},
        163,
        "model-{:05d}-of-{:06d}.safetensors",
    ),
    "Kimi-K2-Instruct": Release(
        139_644,
        1_026_408_232_448,
        {"F8_E4M3": 1_023_893_241_856, "BF16": 2_514_970_968, "F32": 62_518_232},
        61,
        "model-{}-of-{}.safetensors",
    ),
    "GLM-4.5": Release(44_691, 358_337_791_296, {"BF16": 358_337_776_896, "F32": 14_400}, 93),
    "gpt-oss-20b": Release(459, 20_914_757_184, {"BF16": 1_804_459_584, "U8": 10_152_345_600}, 3, first=0),
    "gpt-oss-20b-BF16": Release(411, 20_914_757_184, {"BF16": 20_914_757_184}, 9),
    "gpt-oss-120b": Release(687, 116_829_156_672, {"BF16": 2_167_371_072, "U8": 60_914_073_600}, 15, first=0),
    "Qwen2.5-VL-3B-Instruct": Release(824, 3_754_622_976, {"BF16": 3_754_622_976}, 2),
    "Qwen2.5-VL-7B-Instruct": Release(729, 8_292_166_656, {"BF16": 8_292_166_656}, 5),
    "Qwen2.5-VL-72B-Instruct": Release(1_353, 73_410_777_344, {"BF16": 73_410_777_344}, 38),
}


@cache
def config_of(name: str) -> Config:
    """The released config.json."""
    found: Config = json.loads((CONFIGS / f"{name}.json").read_text(encoding="utf-8"))
    return found


def tensors(config: Config) -> Iterator[Tensor]:
    """Every tensor of the released files."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield "model.embed_tokens.weight", "BF16", (vocabulary, hidden)
    yield from LAYERS[config["model_type"]](config)
    yield "model.norm.weight", "BF16", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", "BF16", (vocabulary, hidden)


def plain(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """A linear layer in bfloat16."""
    yield f"{name}.weight", "BF16", (rows, columns)


def fp8(name: str, rows: int, columns: int) -> Iterator[Tensor]:
    """A linear layer in FP8 with a scale for every block, the last ones partial."""
    yield f"{name}.weight", "F8_E4M3", (rows, columns)
    yield f"{name}.weight_scale_inv", "F32", (-(-rows // BLOCK), -(-columns // BLOCK))


Linear = Callable[[str, int, int], Iterator[Tensor]]


def norms(config: Config, layer: str) -> Iterator[Tensor]:
    """The two norms of a layer."""
    for name in ("input_layernorm", "post_attention_layernorm"):
        yield f"{layer}.{name}.weight", "BF16", (config["hidden_size"],)


def attention(config: Config, layer: str, biases: str = "", normed: bool = False) -> Iterator[Tensor]:
    """Grouped-query attention; biases: which of q, k, v and o have one; normed: a norm for each query and key head."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    head = config.get("head_dim") or hidden // heads
    groups = config["num_key_value_heads"] * head
    for name, rows in {"q": heads * head, "k": groups, "v": groups, "o": hidden}.items():
        yield from plain(f"{layer}.self_attn.{name}_proj", rows, heads * head if name == "o" else hidden)
        if name in biases:
            yield f"{layer}.self_attn.{name}_proj.bias", "BF16", (rows,)
    for name in "qk" if normed else "":
        yield f"{layer}.self_attn.{name}_norm.weight", "BF16", (head,)


def latent_attention(config: Config, layer: str) -> Iterator[Tensor]:
    """Multi-head latent attention in FP8."""
    hidden, heads, own = config["hidden_size"], config["num_attention_heads"], f"{layer}.self_attn"
    queries, latent, rope = config["q_lora_rank"], config["kv_lora_rank"], config["qk_rope_head_dim"]
    nope, values = config["qk_nope_head_dim"], config["v_head_dim"]
    yield from fp8(f"{own}.q_a_proj", queries, hidden)
    yield f"{own}.q_a_layernorm.weight", "BF16", (queries,)
    yield from fp8(f"{own}.q_b_proj", heads * (nope + rope), queries)
    yield from fp8(f"{own}.kv_a_proj_with_mqa", latent + rope, hidden)
    yield f"{own}.kv_a_layernorm.weight", "BF16", (latent,)
    yield from fp8(f"{own}.kv_b_proj", heads * (nope + values), latent)
    yield from fp8(f"{own}.o_proj", hidden, heads * values)
    if config["model_type"] == "kimi_k2":  # a buffer over hidden_size / heads that was saved with the weights
        yield f"{own}.rotary_emb.inv_freq", "BF16", (hidden // heads // 2,)


def mlp(prefix: str, hidden: int, ffn: int, linear: Linear = plain) -> Iterator[Tensor]:
    """A gated MLP."""
    yield from linear(f"{prefix}.gate_proj", ffn, hidden)
    yield from linear(f"{prefix}.up_proj", ffn, hidden)
    yield from linear(f"{prefix}.down_proj", hidden, ffn)


def mixture(config: Config, layer: str, linear: Linear) -> Iterator[Tensor]:
    """Routed and shared experts behind a router with a correction bias, as DeepSeek and GLM have them."""
    hidden, ffn, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    yield from plain(f"{layer}.mlp.gate", experts, hidden)
    yield f"{layer}.mlp.gate.e_score_correction_bias", "F32", (experts,)
    for expert in range(experts):
        yield from mlp(f"{layer}.mlp.experts.{expert}", hidden, ffn, linear)
    yield from mlp(f"{layer}.mlp.shared_experts", hidden, ffn * config["n_shared_experts"], linear)


def prediction(config: Config, layer: str) -> Iterator[Tensor]:
    """What a layer of multi-token prediction has beside an ordinary layer; two are copies of the model's ends."""
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    yield f"{layer}.embed_tokens.weight", "BF16", (vocabulary, hidden)
    yield from plain(f"{layer}.eh_proj", hidden, 2 * hidden)
    yield f"{layer}.shared_head.head.weight", "BF16", (vocabulary, hidden)
    for name in ("enorm", "hnorm", "shared_head.norm"):
        yield f"{layer}.{name}.weight", "BF16", (hidden,)


def deepseek(config: Config) -> Iterator[Tensor]:
    """DeepSeek-V3, Kimi K2 and GLM-4.5: the first layers dense, the ones after the last for prediction."""
    linear = fp8 if "quantization_config" in config else plain
    for number in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(config, layer)
        latent = "kv_lora_rank" in config
        yield from latent_attention(config, layer) if latent else attention(config, layer, "qkv", config["use_qk_norm"])
        if number < config["first_k_dense_replace"]:
            yield from mlp(f"{layer}.mlp", config["hidden_size"], config["intermediate_size"], linear)
        else:
            yield from mixture(config, layer, linear)
        if number >= config["num_hidden_layers"]:
            yield from prediction(config, layer)


def qwen3_moe(config: Config) -> Iterator[Tensor]:
    """Qwen3 mixtures: every layer has experts, none is shared."""
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(config, layer)
        yield from attention(config, layer, normed=True)
        yield from plain(f"{layer}.mlp.gate", config["num_experts"], config["hidden_size"])
        for expert in range(config["num_experts"]):
            yield from mlp(f"{layer}.mlp.experts.{expert}", config["hidden_size"], config["moe_intermediate_size"])


def mixtral(config: Config) -> Iterator[Tensor]:
    """Mixtral: w1 is the gate, w3 the up and w2 the down projection."""
    hidden, ffn = config["hidden_size"], config["intermediate_size"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(config, layer)
        yield from attention(config, layer)
        yield from plain(f"{layer}.block_sparse_moe.gate", config["num_local_experts"], hidden)
        for expert in range(config["num_local_experts"]):
            for name, shape in {"w1": (ffn, hidden), "w2": (hidden, ffn), "w3": (ffn, hidden)}.items():
                yield from plain(f"{layer}.block_sparse_moe.experts.{expert}.{name}", *shape)


def gpt_oss(config: Config) -> Iterator[Tensor]:
    """GPT-OSS: biases everywhere, sinks, and experts in MXFP4 (32 values are 16 bytes and a scale) or transposed."""
    hidden, ffn, experts = config["hidden_size"], config["intermediate_size"], config["num_local_experts"]
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(config, layer)
        yield from attention(config, layer, "qkvo")
        yield f"{layer}.self_attn.sinks", "BF16", (config["num_attention_heads"],)
        yield from plain(f"{layer}.mlp.router", experts, hidden)
        yield f"{layer}.mlp.router.bias", "BF16", (experts,)
        for name, (rows, columns) in {"gate_up_proj": (2 * ffn, hidden), "down_proj": (hidden, ffn)}.items():
            yield f"{layer}.mlp.experts.{name}_bias", "BF16", (experts, rows)
            if "quantization_config" in config:
                yield f"{layer}.mlp.experts.{name}_blocks", "U8", (experts, rows, columns // 32, 16)
                yield f"{layer}.mlp.experts.{name}_scales", "U8", (experts, rows, columns // 32)
            else:
                yield f"{layer}.mlp.experts.{name}", "BF16", (experts, columns, rows)


def qwen2_5_vl(config: Config) -> Iterator[Tensor]:
    """Qwen2.5-VL: Qwen2 under its usual names, and the vision tower."""
    yield from tower(config["vision_config"])
    for number in range(config["num_hidden_layers"]):
        layer = f"model.layers.{number}"
        yield from norms(config, layer)
        yield from attention(config, layer, "qkv")
        yield from mlp(f"{layer}.mlp", config["hidden_size"], config["intermediate_size"])


def tower(vision: Config) -> Iterator[Tensor]:
    """The vision tower: patches, blocks with biases, and the merger of `spatial_merge_size`² patches."""
    hidden, ffn, out = vision["hidden_size"], vision["intermediate_size"], vision["out_hidden_size"]
    patch, merged = vision["patch_size"], hidden * vision["spatial_merge_size"] ** 2
    pixels = (vision["in_chans"], vision["temporal_patch_size"], patch, patch)
    yield "visual.patch_embed.proj.weight", "BF16", (hidden, *pixels)
    yield "visual.merger.ln_q.weight", "BF16", (hidden,)
    linears = {"visual.merger.mlp.0": (merged, merged), "visual.merger.mlp.2": (out, merged)}
    for number in range(vision["depth"]):
        block = f"visual.blocks.{number}"
        for name in ("norm1", "norm2"):
            yield f"{block}.{name}.weight", "BF16", (hidden,)
        linears |= {f"{block}.attn.qkv": (3 * hidden, hidden), f"{block}.attn.proj": (hidden, hidden)}
        linears |= {f"{block}.mlp.{name}_proj": (ffn, hidden) for name in ("gate", "up")}
        linears |= {f"{block}.mlp.down_proj": (hidden, ffn)}
    for name, shape in linears.items():
        yield from plain(name, *shape)
        yield f"{name}.bias", "BF16", shape[:1]


LAYERS: Mapping[str, Callable[[Config], Iterator[Tensor]]] = {
    "qwen3_moe": qwen3_moe,
    "mixtral": mixtral,
    "deepseek_v3": deepseek,
    "kimi_k2": deepseek,
    "glm4_moe": deepseek,
    "gpt_oss": gpt_oss,
    "qwen2_5_vl": qwen2_5_vl,
}


def weights(config: Config) -> Iterator[Tensor]:
    """The tensors as a model sees them: decoded to bfloat16, without scales and buffers."""
    for name, dtype, shape in tensors(config):
        if name.endswith("_blocks"):
            yield name, "BF16", (*shape[:-2], shape[-2] * shape[-1] * 2)
        elif not name.endswith(("_scales", "_scale_inv", ".inv_freq")):
            yield name, "BF16" if dtype == "F8_E4M3" else dtype, shape


def stored(config: Config, padding: int) -> dict[str, int]:
    """Elements per dtype that Megatron stores: the ends once, with `padding` rows more of vocabulary."""
    copies = re.compile(r"model\.layers\.\d+\.(embed_tokens|shared_head\.head)\.weight")
    found = Counter[str]()
    for name, dtype, shape in weights(config):
        dtype = "F32" if name.endswith(".sinks") else dtype  # what megatron-core's own parameter is
        found[dtype] += 0 if copies.fullmatch(name) else prod(shape)
    found["BF16"] += padding * config["hidden_size"] * (1 if config["tie_word_embeddings"] else 2)
    return dict(found)
