"""megatron-core's configuration of every architecture, and who takes which entry of the recipes' tables."""

from __future__ import annotations

import inspect
from dataclasses import fields as fields_in

import pytest
import torch
import zoo
from megatron.core.models.gpt import GPTModel, gpt_model
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from read_by_hand import EXPECTED, config_of, text_of

from transcoder import InputError
from transcoder.mesh import Mesh
from transcoder.recipes import registry
from transcoder.runtime.config import CLASSES, configured, model_arguments, transformer_config
from transcoder.runtime.fields import ASKED, OF_BRIDGE, fields_of, model_class, routed

RECIPES = {recipe.name: recipe for recipe in registry().values()}


@pytest.mark.parametrize("kind", EXPECTED)
def test_the_configuration_is_what_a_reading_by_hand_gives(kind: str) -> None:
    config = config_of(kind)
    found, wanted = configured(fields_of(config), Mesh()), EXPECTED[kind](text_of(config))
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert isinstance(found, MLATransformerConfig) == wanted["multi_latent_attention"]


def test_every_architecture_has_an_expectation() -> None:
    assert {config_of(kind)["architectures"][0] for kind in EXPECTED} == set(registry())


@pytest.mark.parametrize("kind", zoo.ALL_KINDS)
def test_every_kind_of_the_zoo_has_a_configuration_and_arguments(kind: str) -> None:
    config = config_of(kind)
    fields = fields_of(config)
    if 2 * sum(fields.get("mrope_section", ())) in (0, fields["kv_channels"]):
        assert configured(fields, Mesh()).num_layers == fields["num_layers"]
    arguments, text = model_arguments(config), text_of(config)
    assert arguments["vocab_size"] == text.get("vocab_size", 131)
    assert arguments["max_sequence_length"] == text["max_position_embeddings"]
    assert arguments["share_embeddings_and_output_weights"] == config["tie_word_embeddings"]
    rotates = {"qwen2.5-vl": "mrope", "qwen3-vl": "mrope", "nemotron-h": "none"}
    assert arguments["position_embedding_type"] == next((k for n, k in rotates.items() if kind.startswith(n)), "rope")


@pytest.mark.parametrize("name", RECIPES)
def test_every_entry_of_every_table_is_taken_by_megatron_core_or_known_to_be_megatron_bridges(name: str) -> None:
    table = RECIPES[name].model
    switches = {each: True for each in ("multi_latent_attention", "is_hybrid_model") if each in table}
    found = routed(dict.fromkeys(table) | switches)
    taken = {*found.config, *found.model, *found.asked, *found.of_bridge}
    assert taken == {"max_sequence_length" if each == "seq_length" else each for each in table}
    assert not found.of_bridge or name.startswith("gemma")
    kind = MLATransformerConfig if "multi_latent_attention" in table else TransformerConfig
    assert set(found.config) == {field.name for field in fields_in(kind)} & set(table)
    assert set(found.model) <= set(inspect.signature(model_class(switches).__init__).parameters)


def test_an_entry_that_nobody_takes_is_refused() -> None:
    fields = fields_of(config_of("llama"))
    with pytest.raises(InputError, match="found no_such_field"):
        routed(fields | {"no_such_field": 1})
    assert routed(fields).of_bridge == {}


def test_what_is_declared_of_megatron_core_is_so() -> None:
    taken = {field.name for field in fields_in(MLATransformerConfig)} | set(inspect.signature(GPTModel).parameters)
    assert not taken & {*OF_BRIDGE, *ASKED, "seq_length"}
    source = inspect.getsource(gpt_model)
    assert all(f'"{name}"' in source for name in ASKED)
    used = {name for recipe in RECIPES.values() for name in recipe.model}
    assert {*OF_BRIDGE, *ASKED} <= used


@pytest.mark.parametrize("kind", EXPECTED)
def test_only_classes_that_were_compared_are_built(kind: str) -> None:
    config = config_of(kind)
    if config["architectures"][0] in CLASSES:
        assert transformer_config(config, Mesh(), "bfloat16").params_dtype == torch.bfloat16
    else:
        with pytest.raises(InputError, match="the runtime cannot build this architecture"):
            transformer_config(config, Mesh())


REFUSED = {
    "olmoe": ({"clip_qkv": 8.0}, "clip_qkv has no counterpart"),
    "llama": ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    "qwen3": ({"head_dim": "8"}, "a positive integer"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_value_that_megatron_core_cannot_have_is_refused(kind: str) -> None:
    changes, message = REFUSED[kind]
    with pytest.raises(InputError, match=message):
        transformer_config(config_of(kind) | changes, Mesh())


def test_a_mixture_without_sparse_layers_has_no_experts() -> None:
    for kind in ("qwen3-moe", "qwen2-moe"):
        found = transformer_config(config_of(kind) | {"mlp_only_layers": [0, 1, 2]}, Mesh())
        assert (found.num_moe_experts, found.moe_layer_freq) == (None, 1)
