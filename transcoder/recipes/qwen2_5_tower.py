"""The vision tower of Qwen2.5-VL, in the two forms in which Megatron checkpoints hold it.

a: Hugging Face's own module inside the model, under its own names, as Megatron Bridge keeps it.
b: a Megatron model with layers of its own, `{t}`, and interleaved heads, as mbridge and Pai-Megatron-Patch keep it.
"""

from __future__ import annotations

from transcoder.recipe import rule

A, B = "blocks.{b}.", "blocks.{t}."  # `b` stays in the name, `t` becomes a dimension where layers are stacked
_PARTS = (("weight", " vh"), ("bias", ""))

_COPIED = (
    "patch_embed.proj.weight vo vc vt vp vq",
    f"{A}norm1.weight vh",
    f"{A}norm2.weight vh",
    f"{A}attn.qkv.weight (three vo) vh",
    f"{A}attn.qkv.bias (three vo)",
    f"{A}attn.proj.weight vo vh",
    f"{A}attn.proj.bias vo",
    *(f"{A}mlp.{name}_proj.{part} vf{width}" for name in ("gate", "up") for part, width in _PARTS),
    f"{A}mlp.down_proj.weight vo vf",
    f"{A}mlp.down_proj.bias vo",
    "merger.ln_q.weight vh",
    "merger.mlp.0.weight (vm vo) (vn vh)",
    "merger.mlp.0.bias (vm vo)",
    "merger.mlp.2.weight h (vn vh)",
    "merger.mlp.2.bias h",
)
COPIED = tuple(rule(f"visual.{text}", f"visual.{text}") for text in _COPIED)

V, P = "vision_model.decoder.layers.{t}.", "vision_model.projection.encoder."
MEGATRON = (
    rule("vision_model.patch_embed.proj.weight vo vc vt vp vq", "visual.patch_embed.proj.weight vo vc vt vp vq"),
    rule(f"{V}self_attention.linear_qkv.layer_norm_weight vh", f"visual.{B}norm1.weight vh"),
    *(
        rule(
            f"{V}self_attention.linear_qkv.{part} (va [vdq vdk vdv])/tp{width}",
            f"visual.{B}attn.qkv.{part} [(va vdq) (va vdk) (va vdv)]{width}",
        )
        for part, width in _PARTS
    ),
    rule(f"{V}self_attention.linear_proj.weight vo (va vdq)/tp", f"visual.{B}attn.proj.weight vo (va vdq)"),
    rule(f"{V}self_attention.linear_proj.bias vo", f"visual.{B}attn.proj.bias vo"),
    rule(f"{V}mlp.linear_fc1.layer_norm_weight vh", f"visual.{B}norm2.weight vh"),
    *(
        rule(
            f"{V}mlp.linear_fc1.{part} [vgate/tp vup/tp]{width}",
            f"visual.{B}mlp.gate_proj.{part} vgate{width}",
            f"visual.{B}mlp.up_proj.{part} vup{width}",
        )
        for part, width in _PARTS
    ),
    rule(f"{V}mlp.linear_fc2.weight vo vf/tp", f"visual.{B}mlp.down_proj.weight vo vf"),
    rule(f"{V}mlp.linear_fc2.bias vo", f"visual.{B}mlp.down_proj.bias vo"),
    rule("vision_model.decoder.final_layernorm.weight vh", "visual.merger.ln_q.weight vh"),
    rule(f"{P}linear_fc1.weight (vm vo)/tp (vn vh)", "visual.merger.mlp.0.weight (vm vo) (vn vh)"),
    rule(f"{P}linear_fc1.bias (vm vo)/tp", "visual.merger.mlp.0.bias (vm vo)"),
    rule(f"{P}linear_fc2.weight h (vn vh)/tp", "visual.merger.mlp.2.weight h (vn vh)"),
    rule(f"{P}linear_fc2.bias h", "visual.merger.mlp.2.bias h"),
)
AXES = {
    "b": "vision_depth",
    "t": "b",
    "vh": "vision_hidden_size",
    "vo": "vh",
    "vf": "vision_intermediate_size",
    "vgate": "vf",
    "vup": "vf",
    "vc": "vision_in_channels or vision_in_chans or 3",
    "vt": "vision_temporal_patch_size or 2",
    "vp": "vision_patch_size",
    "vq": "vp",
    "vm": "(vision_spatial_merge_size or 2) * (vision_spatial_merge_size or 2)",
    "vn": "vm",
    "va": "vision_num_heads or 16",
    "vdq": "vh // va if vh % va == 0 else None",
    "vdk": "vdq",
    "vdv": "vdq",
    "three": "3",
}
SHOWN = {"tower": {"a": "visual.patch_embed.proj.weight", "b": "vision_model.patch_embed.proj.weight"}}
