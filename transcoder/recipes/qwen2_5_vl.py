"""Qwen2.5-VL: Qwen2 under a prefix; the vision tower under Hugging Face's own names, as Megatron Bridge keeps it."""

from transcoder.recipe import Recipe, moved, moved_state, rule
from transcoder.recipes.blocks import ATTENTION, AXES, DENSE, EMBED, EXTRA_STATE, FINAL, GATED_MLP, qkv_bias

TEXT = (*EMBED, *ATTENTION, qkv_bias(), *GATED_MLP, *FINAL)
OLD, NEW = "prefix == 'old'", "prefix == 'new'"
INSIDE = ("", "language_model.")
B = "blocks.{b}."

TOWER = (
    "patch_embed.proj.weight vo vc vt vp vq",
    f"{B}norm1.weight vh",
    f"{B}norm2.weight vh",
    f"{B}attn.qkv.weight (three vo) vh",
    f"{B}attn.qkv.bias (three vo)",
    f"{B}attn.proj.weight vo vh",
    f"{B}attn.proj.bias vo",
    *(f"{B}mlp.{name}_proj.weight vf vh" for name in ("gate", "up")),
    *(f"{B}mlp.{name}_proj.bias vf" for name in ("gate", "up")),
    f"{B}mlp.down_proj.weight vo vf",
    f"{B}mlp.down_proj.bias vo",
    "merger.ln_q.weight vh",
    "merger.mlp.0.weight (vm vo) (vn vh)",
    "merger.mlp.0.bias (vm vo)",
    "merger.mlp.2.weight h (vn vh)",
    "merger.mlp.2.bias h",
)
VISION = tuple(rule(f"visual.{text}", f"visual.{text}") for text in TOWER)
VISION_AXES = {
    "b": "vision_depth",
    "vh": "vision_hidden_size",
    "vo": "vh",
    "vf": "vision_intermediate_size",
    "vc": "vision_in_channels or vision_in_chans or 3",
    "vt": "vision_temporal_patch_size or 2",
    "vp": "vision_patch_size",
    "vq": "vp",
    "vm": "(vision_spatial_merge_size or 2) * (vision_spatial_merge_size or 2)",
    "vn": "vm",
    "three": "3",
}

RECIPE = Recipe(
    name="qwen2_5_vl",
    hf={"Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl"},
    axes=AXES | VISION_AXES,
    rules=moved(TEXT, OLD, INSIDE)
    + moved(TEXT, NEW, INSIDE, ("model.", "model.language_model."))
    + moved(VISION, OLD)
    + moved(VISION, NEW, hf=("visual.", "model.visual.")),
    extra_state=moved_state(EXTRA_STATE, mcore=INSIDE),
    model=DENSE
    | {
        "add_qkv_bias": "True",
        "add_bias_linear": "False",
        "position_embedding_type": "'mrope'",
        "mrope_section": "mrope_section or (16, 24, 24)",
    },
    hf_variants={
        "prefix": {
            "old": "model.layers.{l}.input_layernorm.weight",
            "new": "model.language_model.layers.{l}.input_layernorm.weight",
        }
    },
    checks={
        "hidden_act is not None and hidden_act != 'silu'": "hidden_act is not silu",
        "vision_config is not None": "the vision tower's configuration is not carried over",
    },
)
