"""Llama 2 and 3, Mistral: dense decoder, grouped-query attention, gated MLP, optional biases."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import ATTENTION, AXES, BIASES, CHECKS, DENSE, EMBED, EXTRA_STATE, FINAL, GATED_MLP

RECIPE = Recipe(
    name="llama",
    hf={"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"},
    axes=AXES,
    rules=EMBED + ATTENTION + BIASES + GATED_MLP + FINAL,
    extra_state=EXTRA_STATE,
    model=DENSE,
    ignore=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
    checks=CHECKS,
)
