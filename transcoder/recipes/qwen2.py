"""Qwen2 and Qwen2.5: Llama with biases on q, k and v, which the config does not mention."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import ATTENTION, AXES, CHECKS, DENSE, EMBED, EXTRA_STATE, FINAL, GATED_MLP, qkv_bias

RECIPE = Recipe(
    name="qwen2",
    hf={"Qwen2ForCausalLM": "qwen2"},
    axes=AXES,
    rules=(*EMBED, *ATTENTION, qkv_bias(), *GATED_MLP, *FINAL),
    extra_state=EXTRA_STATE,
    model=DENSE | {"add_qkv_bias": "True", "add_bias_linear": "False"},
    checks=CHECKS,
)
