"""Qwen3 dense: Llama with a norm over each query and key head; head_dim is explicit."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import (
    ATTENTION,
    AXES,
    CHECKS,
    DENSE,
    EMBED,
    EXTRA_STATE,
    FINAL,
    GATED_MLP,
    NO_BIAS,
    QK_NORM,
    QK_NORM_STATE,
)

RECIPE = Recipe(
    name="qwen3",
    hf={"Qwen3ForCausalLM": "qwen3"},
    axes=AXES | {"d": "head_dim or 128"},
    rules=EMBED + ATTENTION + QK_NORM + GATED_MLP + FINAL,
    extra_state=EXTRA_STATE + QK_NORM_STATE,
    model=DENSE | NO_BIAS | {"qk_layernorm": "True"},
    checks=CHECKS,
)
