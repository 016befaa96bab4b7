"""Gemma 3 without images."""

from transcoder.recipe import Recipe
from transcoder.recipes import gemma3_text as text

RECIPE = Recipe(
    name="gemma3",
    hf={"Gemma3ForCausalLM": "gemma3_text"},
    defaults={"tie_word_embeddings": True},
    axes=text.AXES,
    rules=text.RULES,
    extra_state=text.STATE,
    model=text.MODEL | {"_target_": "'megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider'"},
    checks=text.CHECKS,
    runs=text.RUNS,
)
