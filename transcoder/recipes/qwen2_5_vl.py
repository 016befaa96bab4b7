"""Qwen2.5-VL: Qwen2 under a prefix, and a vision tower; both are in files under an old and a new prefix."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks
from transcoder.recipes import qwen2_5_tower as tower

TEXT = (*blocks.EMBED, *blocks.ATTENTION, blocks.qkv_bias(), *blocks.GATED_MLP, *blocks.FINAL)
INSIDE, OLD, NEW = ("", "language_model."), "prefix == 'old'", "prefix == 'new'"
VISION = moved(tower.COPIED, "tower == 'a'") + moved(tower.MEGATRON, "tower == 'b'")
LAYER = "layers.{l}.input_layernorm.weight"

RECIPE = Recipe(
    name="qwen2_5_vl",
    hf={"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"},
    defaults={"max_window_layers": 80},
    axes=blocks.AXES | tower.AXES,
    kinds=blocks.sliding(blocks.QWEN_WINDOWED),
    rules=moved(TEXT, OLD, INSIDE)
    + moved(TEXT, NEW, INSIDE, ("model.", "model.language_model."))
    + moved(VISION, OLD)
    + moved(VISION, NEW, hf=("visual.", "model.visual.")),
    extra_state=moved_state(blocks.EXTRA_STATE, mcore=INSIDE),
    model=blocks.DENSE
    | blocks.WINDOW
    | {"add_qkv_bias": "True", "add_bias_linear": "False"}
    | {"position_embedding_type": "'mrope'", "mrope_section": "mrope_section or (16, 24, 24)"},
    hf_variants={"prefix": {"old": f"model.{LAYER}", "new": f"model.language_model.{LAYER}"}},
    mcore_variants=tower.SHOWN,
    checks={
        "hidden_act is not None and hidden_act != 'silu'": "hidden_act is not silu",
        "vision_config is not None": "the vision tower's configuration is not carried over",
    },
)
