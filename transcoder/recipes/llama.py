"""Llama 2 and 3, Mistral: dense decoder, grouped-query attention, gated MLP, optional biases."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks

RECIPE = Recipe(
    name="llama",
    hf={"LlamaForCausalLM": "llama", "MistralForCausalLM": "mistral"},
    axes=blocks.AXES,
    kinds={"sliding": "sliding_window is not None and model_type == 'mistral'"},  # Llama ignores it
    rules=blocks.EMBED + blocks.ATTENTION + blocks.BIASES + blocks.GATED_MLP + blocks.FINAL,
    extra_state=blocks.EXTRA_STATE,
    model=blocks.DENSE | blocks.WINDOW,
    ignore=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
    checks=blocks.CHECKS,
)
