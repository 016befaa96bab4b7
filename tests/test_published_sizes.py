"""The planned tensors of published sizes are those of transformers' own classes, and Megatron's keys hold as much."""

from __future__ import annotations

from functools import lru_cache
from math import prod
from typing import Any

import pytest
import torch
from hf_models import KINDS, Shapes, config_of, shapes_of
from transformers import AutoConfig, AutoModelForCausalLM

from transcoder.dialects import DIALECTS
from transcoder.hfconfig import architecture_of, normalise
from transcoder.planner import Model, build_model
from transcoder.recipes import recipe_for
from transcoder.sizing import axis_sizes

LLAMA3 = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "rms_norm_eps": 1e-5,
          "hidden_act": "silu", "attention_bias": False, "num_key_value_heads": 8, "rope_theta": 500000.0,
          "max_position_embeddings": 8192, "torch_dtype": "bfloat16"}  # fmt: skip
QWEN = {"vocab_size": 151936, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_theta": 1000000.0,
        "use_sliding_window": False, "max_position_embeddings": 32768, "torch_dtype": "bfloat16"}  # fmt: skip
QWEN2 = {**QWEN, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**QWEN, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 128, "attention_bias": False}
MISTRAL = {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_size": 4096,
           "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8,
           "rms_norm_eps": 1e-5, "hidden_act": "silu", "max_position_embeddings": 32768, "tie_word_embeddings": False,
           "torch_dtype": "bfloat16"}  # fmt: skip
ROPE = {"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0, "original_max_position_embeddings": 8192,
        "rope_type": "llama3"}  # fmt: skip


def _dense(base: dict[str, Any], layers: int, hidden: int, ffn: int, heads: int, groups: int, **more: Any) -> Any:
    sizes = {"num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": ffn}
    return {**base, **sizes, "num_attention_heads": heads, "num_key_value_heads": groups, **more}


# config.json of the published models, with the number of parameters on their model cards.
PUBLISHED: dict[str, tuple[int, dict[str, Any]]] = {
    "Llama-3.2-1B": (
        1_235_814_400,
        _dense(LLAMA3, 16, 2048, 8192, 32, 8, head_dim=64, tie_word_embeddings=True, rope_scaling=ROPE),
    ),
    "Llama-3-70B": (70_553_706_496, _dense(LLAMA3, 80, 8192, 28672, 64, 8, tie_word_embeddings=False)),
    "Qwen2.5-0.5B": (494_032_768, _dense(QWEN2, 24, 896, 4864, 14, 2, tie_word_embeddings=True)),
    "Qwen2.5-72B": (
        72_706_203_648,
        _dense(QWEN2, 80, 8192, 29568, 64, 8, tie_word_embeddings=False, vocab_size=152064),
    ),
    "Qwen3-0.6B": (596_049_920, _dense(QWEN3, 28, 1024, 3072, 16, 8, tie_word_embeddings=True)),
    "Qwen3-32B": (32_762_123_264, _dense(QWEN3, 64, 5120, 25600, 64, 8, tie_word_embeddings=False)),
    "Mistral-7B-v0.1": (7_241_732_096, {**MISTRAL, "vocab_size": 32000, "rope_theta": 1e4, "sliding_window": 4096}),
    "Mistral-7B-v0.3": (7_248_023_552, {**MISTRAL, "vocab_size": 32768, "rope_theta": 1e6, "sliding_window": None}),
}


def transformers_config(config: dict[str, Any]) -> Any:
    """transformers' own config object for a published config.json."""
    fields = {name: value for name, value in config.items() if name not in ("model_type", "architectures")}
    return AutoConfig.for_model(config["model_type"], **fields)


def transformers_shapes(config: dict[str, Any]) -> tuple[Shapes, int]:
    """Name and shape of every tensor that the class saves, and its number of parameters; no memory is used."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(transformers_config(config))
    assert type(model).__name__ == config["architectures"][0]
    tied = {"lm_head.weight"} if config["tie_word_embeddings"] else set()
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items() if name not in tied}
    return shapes, sum(parameter.numel() for parameter in model.parameters())


@lru_cache
def published(name: str) -> tuple[Shapes, int]:
    """transformers' side of a published size."""
    return transformers_shapes(PUBLISHED[name][1])


def planned(config: dict[str, Any], architecture: str, dialect: str = "stacked", pad: int = 0) -> Model:
    """Our side: the model that the config describes."""
    recipe, values = recipe_for(architecture), normalise(config)
    return build_model(recipe, values, axis_sizes(recipe, values, 10_000) | {"pad": pad}, dialect)


@pytest.mark.parametrize("name", PUBLISHED)
def test_names_shapes_and_parameters_are_those_of_transformers(name: str) -> None:
    count, config = PUBLISHED[name]
    shapes, parameters = published(name)
    found = {tensor.name: tensor.shape for tensor in planned(config, architecture_of(config)).hf.values()}
    assert found == shapes
    assert sum(prod(shape) for shape in found.values()) == parameters == count


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_that_transformers_writes_describes_the_same_model(name: str) -> None:
    config = PUBLISHED[name][1]
    written = transformers_config(config).to_dict()
    one, two = (planned(values, architecture_of(config)) for values in (config, written))
    assert {key: tensor.shape for key, tensor in one.hf.items()} == {
        key: tensor.shape for key, tensor in two.hf.items()
    }
    assert one.fields() == two.fields()
    assert one.weights_only() == two.weights_only()


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_megatron_keys_hold_the_same_number_of_elements_without_padding(name: str, dialect: str) -> None:
    count, config = PUBLISHED[name]
    pad = -config["vocab_size"] % 1024
    model = planned(config, architecture_of(config), dialect, pad)
    matrices = 1 if config["tie_word_embeddings"] else 2
    elements = sum(prod(tensor.shape) for tensor in model.mcore.values())
    assert elements - matrices * pad * config["hidden_size"] == count
    numbered = any(".layers.0." in key for key in model.mcore)
    assert numbered == (dialect != "stacked")
    assert ("output_layer.weight" in model.mcore) == (matrices == 2)


@pytest.mark.parametrize("kind", KINDS)
def test_the_small_models_of_these_tests_have_the_tensors_of_transformers(kind: str) -> None:
    config = config_of(kind)
    shapes, parameters = transformers_shapes(config)
    assert shapes_of(config) == shapes
    assert {tensor.name: tensor.shape for tensor in planned(config, architecture_of(config)).hf.values()} == shapes
    assert sum(prod(shape) for shape in shapes.values()) == parameters
