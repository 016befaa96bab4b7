"""What megatron-core is told of a model: the table of its recipe over config.json, or a checkpoint's own configuration.

A field goes to the configuration, to the model or to both, as the installed megatron-core declares them.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

from transcoder.errors import Problem, refuse
from transcoder.formats.mcore import SILU, SQUARED_RELU
from transcoder.formats.opening import open_store
from transcoder.hfconfig import architecture_of, normalise
from transcoder.megatronconfig import stored_fields
from transcoder.planner import Model
from transcoder.recipes import recipe_for, registry
from transcoder.runtime.switches import OF_BRIDGE as TRANSLATED
from transcoder.runtime.switches import Switches, switches_of
from transcoder.sizing import axis_sizes, given_sizes

# Megatron's own switches for layers that are not built here.
SWITCHES = (
    "is_hybrid_model",
    "experimental_attention_variant",
    "attention_output_gate",
    "layernorm_zero_centered_gamma",
    "glu_linear_offset",
    "softmax_scale",  # Granite's, whose multipliers such a configuration lacks
)
RENAMED = {"seq_length": "max_sequence_length"}  # a field that models call otherwise
# What a model asks its configuration for, though that has no such fields; `rotary.py` answers instead.
ASKED = (
    "yarn_rotary_scaling_factor",
    "yarn_original_max_position_embeddings",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "yarn_correction_range_round_to_int",
)
# What only the models of Megatron Bridge take; those that say something new are translated.
OF_BRIDGE = ("_target_", "query_pre_attn_scalar", *TRANSLATED)
NULLS = ("q_lora_rank",)  # None says something there, though megatron-core takes a number for what is not said
MOST = 1 << 16  # layers, or layers times experts

Fields = dict[str, Any]


@dataclass
class ModelConfig(Switches, TransformerConfig):  # type: ignore[misc]
    """TransformerConfig with what megatron-core has no field for."""


@dataclass
class LatentConfig(Switches, MLATransformerConfig):  # type: ignore[misc]
    """The same for multi-latent attention."""


@dataclass(frozen=True)
class Routed:
    """The fields of a table by who takes them; some are taken by two."""

    config: Fields  # the configuration's
    model: Fields  # arguments of the model
    asked: Fields
    of_bridge: Fields


def unsupported(found: str, expected: str) -> Exception:
    """The error for a model that cannot be built."""
    problem = Problem(file="config.json", expected=expected, found=found)
    return refuse("config", "the runtime cannot build this model", [problem])


def is_megatron(config: dict[str, Any]) -> bool:
    """Whether these are Megatron's own fields, as `stored_model` gives them, instead of a parsed config.json."""
    return "num_layers" in config and "architectures" not in config


def fields_of(config: dict[str, Any], whole: bool = True) -> Fields:
    """What the recipe's table says of a parsed config.json; fields of Megatron's as they are.

    whole: refuse a config that does not describe a model, with an InputError.
    """
    if is_megatron(config):
        return config
    recipe = recipe_for(architecture_of(config))
    values = normalise(config, recipe.defaults)
    sizes = axis_sizes(recipe, values, MOST) if whole else given_sizes(recipe, values)[0]
    nulls = {name: None for name in NULLS if name in recipe.model}
    return nulls | Model(recipe, values, sizes, "", ()).fields() | switches_of(recipe, values, sizes)


def stored_model(folder: Path) -> Fields:
    """What the tables would say, as an iteration's own configuration does: for a checkpoint without a config.json.

    Raises InputError for a model whose layers are not built here.
    """
    found = stored_fields(folder)
    known = {name for recipe in registry().values() for name in recipe.model} - {"_target_"}
    fields = {name: found[name] for name in known if found.get(name) is not None}
    fields |= {"vocab_size": found.get("vocab_size") or found.get("padded_vocab_size"), "activation_func": _act(found)}
    if used := [name for name in SWITCHES if fields.get(name)]:
        raise unsupported(", ".join(f"{name} {fields[name]}" for name in used), "a configuration without these")
    if fields.get("normalization") != "RMSNorm" or "num_layers" not in fields:
        raise unsupported(f"normalization {fields.get('normalization')}", "RMSNorm")
    tensors = open_store(folder).tensors
    norms = [shape[-1] for key, (_, shape, _) in tensors.items() if key.endswith("q_layernorm.weight")]
    return _of_attention(fields) | {"wide_qk_norm": any(width != fields["kv_channels"] for width in norms)}


def _of_attention(fields: Fields) -> Fields:
    """Fields without those of latent attention, which Megatron-LM's arguments always have, where it is not used."""
    if fields.get("multi_latent_attention"):
        return dict.fromkeys(NULLS) | fields
    classes = (MLATransformerConfig, TransformerConfig)
    latent, plain = ({field.name for field in dataclasses.fields(each)} for each in classes)
    alone = latent - plain - set(inspect.signature(GPTModel.__init__).parameters)
    return {name: value for name, value in fields.items() if name not in alone}


def _act(found: Fields) -> str:
    """The activation by its path, as the YAML has it or as Megatron-LM's arguments imply it."""
    stored = found.get("activation_func")
    if isinstance(stored, dict):
        return str(stored.get("_target_"))
    gated = SILU if found.get("gated_linear_unit") else "torch.nn.functional.gelu"
    return SQUARED_RELU if found.get("squared_relu") else gated


def model_class(fields: Fields) -> Any:
    """The class that takes such fields beside a configuration."""
    if not fields.get("is_hybrid_model"):
        return GPTModel
    from megatron.core.models.mamba import MambaModel

    return MambaModel


def config_class(fields: Fields) -> Any:
    """The configuration class that takes such fields."""
    return LatentConfig if fields.get("multi_latent_attention") else ModelConfig


def routed(fields: Fields) -> Routed:
    """Every field by who takes it. Raises InputError for one that nobody does."""
    of_config = {field.name for field in dataclasses.fields(config_class(fields))}
    of_model = set(inspect.signature(model_class(fields).__init__).parameters)
    arguments = {RENAMED.get(name, name): value for name, value in fields.items()}
    found = Routed(
        {name: value for name, value in fields.items() if name in of_config},
        {name: value for name, value in arguments.items() if name in of_model},
        {name: fields[name] for name in ASKED if name in fields},
        {name: fields[name] for name in OF_BRIDGE if name in fields},
    )
    taken = {*found.config, *found.model, *found.asked, *found.of_bridge}
    if homeless := [name for name in fields if RENAMED.get(name, name) not in taken]:
        raise unsupported(f"{', '.join(sorted(homeless))}", "fields that the installed megatron-core takes")
    return found
