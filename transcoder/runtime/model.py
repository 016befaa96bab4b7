"""Builds the megatron-core GPT model of a Hugging Face config.json, and runs it forward."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from transcoder.runtime.device import init_parallel, install_cuda_shim

install_cuda_shim()

from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec  # noqa: E402
from megatron.core.transformer.transformer_block import (  # noqa: E402
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402

from transcoder.runtime.layers import CoreAttention, HFColumnLinear, HFNorm, StaticRotary  # noqa: E402

CLASSES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class Stage(GPTModel):  # type: ignore[misc]
    """A pipeline stage whose tied embedding copies are both filled by the loader, never broadcast."""

    real_vocab: int = 0

    def setup_embeddings_and_output_layer(self) -> None:
        """Nothing: the stock method copies the embedding through CUDA."""


def family(config: dict[str, Any]) -> str:
    """The supported class name of a parsed config.json."""
    names = config.get("architectures") or []
    found = [name for name in names if name in CLASSES]
    if not found:
        raise ValueError(f"the runtime cannot build {names or config.get('model_type')}: it knows {', '.join(CLASSES)}")
    return str(found[0])


def head_size(config: dict[str, Any]) -> int:
    """The size of one attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_settings(config: dict[str, Any]) -> dict[str, Any]:
    """One spelling of the rotary settings: always with `rope_type` and `rope_theta`."""
    raw = dict(config.get("rope_parameters") or config.get("rope_scaling") or {})
    kind = raw.pop("type", None)
    raw.setdefault("rope_type", kind or "default")
    raw.setdefault("rope_theta", config.get("rope_theta", 10000.0))
    if raw["rope_type"] not in ROPE_TYPES:
        raise ValueError(f"rope_type {raw['rope_type']!r} is not supported: only {', '.join(ROPE_TYPES)}")
    return raw


def _scaled_rope(config: dict[str, Any], rope: dict[str, Any]) -> tuple[Any, float]:
    """Frequencies and factor as transformers computes them."""
    from transformers import AutoConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    plain = {
        key: value for key, value in config.items() if key not in ("rope_parameters", "rope_scaling", "model_type")
    }
    spelled = AutoConfig.for_model(config["model_type"], **plain)
    spelled.rope_theta, spelled.rope_scaling, spelled.rope_parameters = rope["rope_theta"], rope, rope
    inv_freq, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](spelled, "cpu")
    return inv_freq, float(factor)


def rotary(config: dict[str, Any]) -> tuple[Any, float]:
    """Inverse frequencies (float32) and the factor on cos and sin."""
    rope = rope_settings(config)
    if rope["rope_type"] != "default":
        return _scaled_rope(config, rope)
    size = head_size(config)
    exponents = torch.arange(0, size, 2, dtype=torch.int64).to(torch.float32) / size
    return 1.0 / (rope["rope_theta"] ** exponents), 1.0


def _windowed_layers(config: dict[str, Any]) -> list[int]:
    """1 for each layer with a sliding window."""
    layers = int(config["num_hidden_layers"])
    name = family(config)
    if not config.get("sliding_window") or name == "LlamaForCausalLM":
        return [0] * layers
    if name == "MistralForCausalLM":
        return [1] * layers
    if not config.get("use_sliding_window"):
        return [0] * layers
    kinds = config.get("layer_types")
    first = config.get("max_window_layers", layers)
    return [int(kinds[i] == "sliding_attention" if kinds else i >= first) for i in range(layers)]


def _window_fields(config: dict[str, Any]) -> dict[str, Any]:
    """The window's size and layers; nothing when no layer has one."""
    windowed = _windowed_layers(config)
    if not any(windowed):
        return {}
    return {"window_size": (int(config["sliding_window"]) - 1, 0), "window_attn_skip_freq": windowed}


def _bias_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Megatron has one switch for all biases, and one more for QKV alone."""
    name = family(config)
    wanted = bool(config.get("attention_bias") or config.get("mlp_bias")) and name != "Qwen2ForCausalLM"
    return {"add_bias_linear": wanted, "add_qkv_bias": name == "Qwen2ForCausalLM"}


def _shape_fields(config: dict[str, Any]) -> dict[str, Any]:
    """Sizes and the norm's epsilon."""
    if config.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {config['hidden_act']!r} is not supported: only silu")
    return {
        "num_layers": int(config["num_hidden_layers"]),
        "hidden_size": int(config["hidden_size"]),
        "ffn_hidden_size": int(config["intermediate_size"]),
        "num_attention_heads": int(config["num_attention_heads"]),
        "num_query_groups": int(config.get("num_key_value_heads") or config["num_attention_heads"]),
        "kv_channels": head_size(config),
        "layernorm_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        "qk_layernorm": family(config) == "Qwen3ForCausalLM",
    }


def _type_fields(dtype: str) -> dict[str, Any]:
    """The compute type, in the three places that ask for it."""
    kind = getattr(torch, dtype)
    return {
        "params_dtype": kind,
        "pipeline_dtype": kind,
        "bf16": kind == torch.bfloat16,
        "fp16": kind == torch.float16,
    }


_CONSTANTS: dict[str, Any] = {
    "normalization": "RMSNorm",
    "activation_func": torch.nn.functional.silu,
    "gated_linear_unit": True,
    "use_cpu_initialization": True,
    "perform_initialization": False,
    "hidden_dropout": 0.0,
    "attention_dropout": 0.0,
    "apply_rope_fusion": False,
    "masked_softmax_fusion": False,
    "bias_dropout_fusion": False,
    "bias_activation_fusion": False,
    "gradient_accumulation_fusion": False,
    "persist_layer_norm": False,
}


def transformer_config(config: dict[str, Any], tp: int = 1, pp: int = 1, dtype: str = "float32") -> Any:
    """The TransformerConfig of a parsed config.json."""
    grid = {"tensor_model_parallel_size": tp, "pipeline_model_parallel_size": pp}
    fields = _shape_fields(config) | _bias_fields(config) | _window_fields(config) | _type_fields(dtype)
    return TransformerConfig(**_CONSTANTS, **fields, **grid)


def local_layers(config: Any) -> Any:
    """megatron's local spec with our attention, norms and QKV layer, for this stage's layers."""
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = HFNorm
    attention = parts.self_attention.submodules
    attention.core_attention, attention.linear_qkv = CoreAttention, HFColumnLinear
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = HFNorm
    return TransformerBlockSubmodules([layer] * get_num_layers_to_build(config), HFNorm)


def cast_parameters(model: Any, dtype: Any) -> None:
    """Cast parameters only: a rounded rotary buffer changes the logits."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _construct(config: dict[str, Any], mcore: Any, layers: Any, tp: int) -> Any:
    """The stage of this rank, still without weights."""
    vocab = int(config["vocab_size"])
    return Stage(
        mcore,
        layers,
        vocab_size=-(-vocab // tp) * tp,
        max_sequence_length=int(config.get("max_position_embeddings", 2048)),
        pre_process=mpu.is_pipeline_first_stage(),
        post_process=mpu.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=bool(config.get("tie_word_embeddings", False)),
        position_embedding_type="rope",
    )


def _set_rotary(model: Any, config: dict[str, Any]) -> None:
    """Give the model our frequencies; megatron takes the factor from an attribute of its configuration."""
    inv_freq, factor = rotary(config)
    if factor < 1.0:
        raise ValueError(f"a rotary attention factor below 1 ({factor}) is not supported")
    if factor != 1.0:
        model.config.yarn_rotary_scaling_factor = math.exp((factor - 1.0) / 0.1)
    model.rotary_pos_emb = StaticRotary(inv_freq)


def build_model(
    config: dict[str, Any],
    tp: int = 1,
    pp: int = 1,
    dtype: str = "float32",
    layer_spec: str | Callable[[Any], Any] = "local",
) -> Any:
    """This rank's stage of the model, parameters unset.

    `layer_spec` is "local", or a function from TransformerConfig to TransformerBlockSubmodules.
    """
    if isinstance(layer_spec, str) and layer_spec != "local":
        raise ValueError(f"unknown layer spec {layer_spec!r}")
    init_parallel(tp, pp)
    mcore = transformer_config(config, tp, pp, dtype)
    layers = local_layers(mcore) if isinstance(layer_spec, str) else layer_spec(mcore)
    model = _construct(config, mcore, layers, tp)
    model.real_vocab = int(config["vocab_size"])
    _set_rotary(model, config)
    cast_parameters(model, mcore.params_dtype)
    return model.eval()


def _receive(model: Any, tokens: Any) -> None:
    """Take the hidden states of the stage before."""
    shape = (tokens.shape[1], tokens.shape[0], model.config.hidden_size)
    hidden = torch.empty(shape, dtype=model.config.params_dtype, device=tokens.device)
    dist.recv(hidden, mpu.get_pipeline_model_parallel_prev_rank())
    model.set_input_tensor(hidden)


@torch.no_grad()  # type: ignore[untyped-decorator]
def stage_forward(model: Any, tokens: Any) -> Any:
    """One forward over the pipeline, tokens [b, s] on every rank: logits [b, s, vocabulary] on the last stage."""
    if not model.pre_process:
        _receive(model, tokens)
    positions = torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)
    out = model(tokens, positions, None)
    if model.post_process:
        return out[..., : model.real_vocab]
    dist.send(out.contiguous(), mpu.get_pipeline_model_parallel_next_rank())
    return None
