"""Qwen3 dense: Llama with a norm over each query and key head; head_dim is explicit."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks

RECIPE = Recipe(
    name="qwen3",
    hf={"Qwen3ForCausalLM": "qwen3"},
    defaults=blocks.QWEN_DEFAULTS,
    axes=blocks.AXES | {"d": "head_dim or 128"},
    kinds=blocks.sliding(blocks.QWEN_WINDOWED),
    rules=blocks.EMBED + blocks.ATTENTION + blocks.QK_NORM + blocks.GATED_MLP + blocks.FINAL,
    extra_state=blocks.EXTRA_STATE + blocks.QK_NORM_STATE,
    model=blocks.DENSE | blocks.WINDOW | blocks.NO_BIAS | {"qk_layernorm": "True"},
    checks=blocks.CHECKS,
)
