"""What layers here need to know of a model and megatron-core's configuration has no field for.

Some of it the rules show: where norms are, and how wide. The rest is in the recipes' tables, under `runs` or under the
names that Megatron Bridge has.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from megatron.core.transformer.utils import is_layer_window_attention

from transcoder.recipe import Recipe, evaluate
from transcoder.sizing import layer_lists

Fields = dict[str, Any]

# Switches, and other fields, by the names that models of Megatron Bridge have for them.
OF_BRIDGE = {
    "attn_logit_softcapping": "attention_softcap",
    "final_logit_softcapping": "logits_softcap",
    "interleaved_attn_pattern": "window_attn_skip_freq",
    "rotary_base_local": "local_rotary_base",
}
SLIDING = "sliding_attention"
# Values that layers have here whatever the config says.
ASSUMED: Mapping[str, Any] = {"hidden_activation": "gelu_pytorch_tanh", "swiglu_alpha": 1.702}


@dataclass
class Switches:
    """Fields beside those of TransformerConfig; the defaults change nothing."""

    wide_qk_norm: bool = False  # norms of queries and keys over all heads at once
    pre_norms: bool = True  # before attention and feed-forward
    post_norms: bool = False  # behind them, before they join the residual stream
    late_rounding: bool = False  # norms round once, behind their weight
    wide_rotation: bool = False  # queries and keys are rotated in float32, behind their norms
    attention_softcap: float | None = None
    logits_softcap: float | None = None
    logits_scaling: float = 1.0  # what logits are divided by
    embedding_multiplier: float = 1.0
    inner_multiplier: bool = False  # whether that one is a buffer of the embedding, in the model's type
    residual_multiplier: float = 1.0
    local_rotary_base: float | None = None  # of layers with windows, where they rotate in their own way


NAMES = frozenset(each.name for each in fields(Switches))


def switches_of(recipe: Recipe, values: Mapping[str, Any], sizes: Mapping[str, int]) -> Fields:
    """The switches that a recipe's rules and its table `runs` give for a config."""
    scope = {**values, **sizes, **layer_lists(recipe, values, sizes)}
    found = {name: evaluate(text, scope) for name, text in recipe.runs.items()}
    return _shown(recipe) | {name: value for name, value in found.items() if value is not None}


def _shown(recipe: Recipe) -> Fields:
    """What the rules show, by the names and layouts of norms."""
    sides = [side for rule in recipe.rules for side in rule.mcore]
    wide = any("q" in side.layout.axes for side in sides if side.name.endswith("q_layernorm.weight"))
    found: Fields = {"wide_qk_norm": wide}
    if any(side.name.endswith("linear_proj.post_layernorm.weight") for side in sides):
        before = any(side.name.endswith("linear_qkv.layer_norm_weight") for side in sides)
        found |= {"pre_norms": before, "post_norms": True}
    return found


def translated(found: Fields) -> Fields:
    """Fields of Megatron Bridge's by our names, as far as they say anything that others do not."""
    ours = {OF_BRIDGE[name]: value for name, value in found.items() if name in OF_BRIDGE}
    if pattern := ours.get("window_attn_skip_freq"):
        ours["window_attn_skip_freq"] = _windowed(pattern, int(found["num_layers"]))
    return ours


def _windowed(pattern: Any, layers: int) -> list[int]:
    """1 for each layer with a window; pattern: the layers' kinds, or how many have one before as many that do not.

    >>> _windowed((2, 1), 5)
    [1, 1, 0, 1, 1]
    """
    if isinstance(pattern, list):
        return [int(kind == SLIDING) for kind in pattern]
    return [int(layer % sum(pattern) < pattern[0]) for layer in range(layers)]


def has_switch(reason: str) -> bool:
    """Whether what a recipe's check says megatron-core lacks is a switch here."""
    return reason.split()[0] in NAMES


def unbuilt(values: Mapping[str, Any], config: Any) -> str:
    """What of a config the layers here would do otherwise; empty when nothing.

    config: the TransformerConfig made of it, whose switches must be numbers.
    """
    for name, value in ASSUMED.items():
        if values.get(name) not in (None, value):
            return f"{name} {values[name]!r}"
    for name in (*NAMES, "softmax_scale"):
        number = getattr(config, name)
        if number is not None and not (type(number) in (bool, int, float) and 0 <= number < 1e18):
            return f"{name} {number!r:.80}"
    listed = values.get("layer_types")
    if config.window_size and isinstance(listed, list) and len(listed) == config.num_layers:
        windows, rhythm = config.window_size, config.window_attn_skip_freq
        found = [is_layer_window_attention(windows, rhythm, number + 1) for number in range(len(listed))]
        if found != [kind == SLIDING for kind in listed]:
            return f"layer_types {listed}"
    return ""
