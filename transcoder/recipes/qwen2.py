"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, which the config does not mention."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks

RECIPE = Recipe(
    name="qwen2",
    hf={"Qwen2ForCausalLM": "qwen2"},
    defaults=blocks.QWEN_DEFAULTS,
    axes=blocks.AXES,
    kinds=blocks.sliding(blocks.QWEN_WINDOWED),
    rules=(*blocks.EMBED, *blocks.ATTENTION, blocks.qkv_bias(), *blocks.GATED_MLP, *blocks.FINAL),
    extra_state=blocks.EXTRA_STATE,
    model=blocks.DENSE | blocks.WINDOW | {"add_qkv_bias": "True", "add_bias_linear": "False"},
    checks=blocks.CHECKS,
)
