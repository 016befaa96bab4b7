"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, which the config does not mention."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks

RECIPE = Recipe(
    name="qwen2",
    hf={"Qwen2ForCausalLM": "qwen2"},
    axes=blocks.AXES,
    rules=(*blocks.EMBED, *blocks.ATTENTION, blocks.qkv_bias(), *blocks.GATED_MLP, *blocks.FINAL),
    extra_state=blocks.EXTRA_STATE,
    model=blocks.DENSE | {"add_qkv_bias": "True", "add_bias_linear": "False"},
    checks=blocks.CHECKS,
)
