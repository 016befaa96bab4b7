"""Granite: Llama's tensors, with multipliers that megatron-core has no fields for."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import (
    ATTENTION,
    AXES,
    BIASES,
    CHECKS,
    DENSE,
    EMBED,
    EXTRA_STATE,
    FINAL,
    GATED_MLP,
    UNMATCHED,
)

MULTIPLIERS = ("embedding_multiplier", "residual_multiplier", "logits_scaling")

RECIPE = Recipe(
    name="granite",
    hf={"GraniteForCausalLM": "granite"},
    axes=AXES,
    rules=EMBED + ATTENTION + BIASES + GATED_MLP + FINAL,
    extra_state=EXTRA_STATE,
    model=DENSE | {"softmax_scale": "attention_multiplier or 1.0"},
    runs={name: name for name in MULTIPLIERS},
    checks=CHECKS
    | {f"{name} not in (None, 1)": f"{name} {UNMATCHED}" for name in MULTIPLIERS}
    | {"True": "Megatron-LM does not take the softmax scale (attention_multiplier) from a checkpoint"},
)
