"""Gemma 3 with images: its text model under a prefix, the SigLIP tower under Hugging Face's own names."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import gemma3_text as text
from transcoder.recipes import siglip

INSIDE, OLD, NEW = ("", "language_model."), "prefix == 'old'", "prefix == 'new'"
BEFORE = moved(text.RULES, OLD, INSIDE, ("model.", "language_model.model."))
LAYER = "layers.{l}.input_layernorm.weight"

RECIPE = Recipe(
    name="gemma3_vl",
    hf={"Gemma3ForConditionalGeneration": "gemma3"},
    defaults={"tie_word_embeddings": True},
    axes=text.AXES | siglip.AXES,
    rules=moved(BEFORE, hf=("lm_head.", "language_model.lm_head."))
    + moved(text.RULES, NEW, INSIDE, ("model.", "model.language_model."))
    + moved(siglip.PROJECTOR, OLD)
    + moved(siglip.PROJECTOR, NEW, hf=("", "model."))
    + siglip.towers(),
    extra_state=moved_state(text.STATE, mcore=INSIDE) + siglip.STATE,
    model=text.MODEL,
    hf_variants={"prefix": {"old": f"language_model.model.{LAYER}", "new": f"model.language_model.{LAYER}"}}
    | siglip.HF_VARIANTS,
    mcore_variants=siglip.MCORE_VARIANTS,
    checks=text.CHECKS | {"vision_config is not None": "the vision tower's configuration is not carried over"},
)
