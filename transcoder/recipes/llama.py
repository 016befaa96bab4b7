"""Llama 2 and 3, Mistral: dense decoder, grouped-query attention, gated MLP, optional biases."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks

RECIPE = Recipe(
    name="llama",
    hf={"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"},
    axes=blocks.AXES,
    rules=blocks.EMBED + blocks.ATTENTION + blocks.BIASES + blocks.GATED_MLP + blocks.FINAL,
    extra_state=blocks.EXTRA_STATE,
    model=blocks.DENSE,
    ignore=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
    checks=blocks.CHECKS,
)
