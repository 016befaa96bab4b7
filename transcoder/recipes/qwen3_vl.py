"""Qwen3-VL: Qwen3 under a prefix, and a vision tower that is a Megatron model with layers of its own."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks
from transcoder.recipes import qwen3_tower as tower

TEXT = blocks.EMBED + blocks.ATTENTION + blocks.QK_NORM + blocks.GATED_MLP + blocks.FINAL
INSIDE, HF = ("", "language_model."), ("model.", "model.language_model.")

RECIPE = Recipe(
    name="qwen3_vl",
    hf={"Qwen3VLForConditionalGeneration": "qwen3_vl"},
    axes=blocks.AXES | tower.AXES | {"d": "head_dim or 128"},
    rules=moved(TEXT, mcore=INSIDE, hf=HF) + tower.RULES,
    extra_state=moved_state(blocks.EXTRA_STATE + blocks.QK_NORM_STATE, mcore=INSIDE) + tower.STATE,
    model=blocks.DENSE | tower.MODEL,
    checks=tower.CHECKS,
)
