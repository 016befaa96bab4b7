"""The vision tower of Qwen3-VL as a Megatron model with layers of its own, as Megatron Bridge and mbridge keep it.

`t` counts the tower's layers and `s` its extra mergers; both are leading dimensions where the decoder's layers are.
"""

from __future__ import annotations

from transcoder.recipe import rule
from transcoder.recipes.blocks import NO_BIAS

V, B = "vision_model.decoder.layers.{t}.", "model.visual.blocks.{t}."
S = "deepstack_merger_list.{s}."
LINEAR = (("weight", " vh"), ("bias", ""))

RULES = (
    rule("vision_model.patch_embed.proj.weight vh vc vt vp vq", "model.visual.patch_embed.proj.weight vh vc vt vp vq"),
    rule("vision_model.patch_embed.proj.bias vh", "model.visual.patch_embed.proj.bias vh"),
    rule("vision_model.pos_embed.weight vn vh", "model.visual.pos_embed.weight vn vh"),
    *(rule(f"{V}self_attention.linear_qkv.layer_norm_{part} vh", f"{B}norm1.{part} vh") for part, _ in LINEAR),
    *(
        rule(
            f"{V}self_attention.linear_qkv.{part} (va [vdq vdk vdv])/tp{width}",
            f"{B}attn.qkv.{part} [(va vdq) (va vdk) (va vdv)]{width}",
        )
        for part, width in LINEAR
    ),
    rule(f"{V}self_attention.linear_proj.weight vh (va vdq)/tp", f"{B}attn.proj.weight vh (va vdq)"),
    rule(f"{V}self_attention.linear_proj.bias vh", f"{B}attn.proj.bias vh"),
    *(rule(f"{V}mlp.linear_fc1.layer_norm_{part} vh", f"{B}norm2.{part} vh") for part, _ in LINEAR),
    *(rule(f"{V}mlp.linear_fc1.{part} vf/tp{width}", f"{B}mlp.linear_fc1.{part} vf{width}") for part, width in LINEAR),
    rule(f"{V}mlp.linear_fc2.weight vh vf/tp", f"{B}mlp.linear_fc2.weight vh vf"),
    rule(f"{V}mlp.linear_fc2.bias vh", f"{B}mlp.linear_fc2.bias vh"),
    *(
        each
        for mcore, hf, normed in (("merger.", "merger.", "vh"), (f"decoder.{S}", S, "vi"))
        for each in (
            *(
                rule(f"vision_model.{mcore}patch_norm.{part} {normed}", f"model.visual.{hf}norm.{part} {normed}")
                for part, _ in LINEAR
            ),
            rule(f"vision_model.{mcore}linear_fc1.weight vm/tp vi", f"model.visual.{hf}linear_fc1.weight vm vi"),
            rule(f"vision_model.{mcore}linear_fc1.bias vm/tp", f"model.visual.{hf}linear_fc1.bias vm"),
            rule(f"vision_model.{mcore}linear_fc2.weight vo vm/tp", f"model.visual.{hf}linear_fc2.weight vo vm"),
            rule(f"vision_model.{mcore}linear_fc2.bias vo", f"model.visual.{hf}linear_fc2.bias vo"),
        )
    ),
)
_INDEXES = "(vision_deepstack_visual_indexes or (8, 16, 24))"
AXES = {
    "t": "vision_depth or 27",
    "s": f"1 if {_INDEXES}[1] is None else 2 if {_INDEXES}[2] is None else 3 if {_INDEXES}[3] is None else"
    f" 4 if {_INDEXES}[4] is None else None",
    "vh": "vision_hidden_size or 1152",
    "va": "vision_num_heads or 16",
    "vdq": "vh // va if vh % va == 0 else None",
    "vdk": "vdq",
    "vdv": "vdq",
    "vf": "vision_intermediate_size or 4304",
    "vn": "vision_num_position_embeddings or 2304",
    "vc": "vision_in_channels or 3",
    "vt": "vision_temporal_patch_size or 2",
    "vp": "vision_patch_size or 16",
    "vq": "vp",
    "vi": "vh * (vision_spatial_merge_size or 2) * (vision_spatial_merge_size or 2)",
    "vm": "vi",
    "vo": "vision_out_hidden_size or 3584",
}
STATE = (
    *((f"{V}{name}", "") for name in ("self_attention.linear_qkv", "self_attention.linear_proj")),
    *((f"{V}mlp.linear_{name}", "") for name in ("fc1", "fc2")),
    *(
        (f"vision_model.{place}{name}", "")
        for place in ("merger.", f"decoder.{S}")
        for name in ("patch_norm", "linear_fc1", "linear_fc2")
    ),
)

# What both models with such a tower have in common besides.
MODEL = NO_BIAS | {
    "qk_layernorm": "True",
    "position_embedding_type": "'mrope'",
    "mrope_section": "mrope_section or (24, 20, 20)",
    "rotary_base": "rope_theta or 500000.0",
    "seq_length": "max_position_embeddings or 128000",
}
CHECKS = {
    "hidden_act is not None and hidden_act != 'silu'": "hidden_act is not silu",
    "vision_config is not None": "the vision tower's configuration is not carried over",
    "rope_type not in (None, 'default', 'mrope')": "rope_scaling is not carried over",
}
