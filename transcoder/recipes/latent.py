"""Rule tuples of multi-latent attention and of multi-token prediction.

Stored keys as in megatron/core/transformer/multi_latent_attention.py and multi_token_prediction.py (0.16): the input
norm stays separate, the norms of the latents are fused into the projections after them.
"""

from __future__ import annotations

from transcoder.recipe import Rule, moved, moved_state, rule
from transcoder.recipes.blocks import D, H

A, S = f"{D}self_attention.linear_", f"{H}self_attn."
COMPRESSED = "q_lora_rank is not None"

AXES = {
    "n": "num_attention_heads",
    "qr": "q_lora_rank",
    "kr": "kv_lora_rank",
    "qd": "qk_nope_head_dim + qk_rope_head_dim",
    "kvd": "qk_nope_head_dim + v_head_dim",
    "vd": "v_head_dim",
    "rope": "qk_rope_head_dim",
}

ATTENTION = (
    rule(f"{D}input_layernorm.weight h", f"{H}input_layernorm.weight h"),
    rule(f"{A}q_proj.weight (n qd)/tp h", f"{S}q_proj.weight (n qd) h", only="q_lora_rank is None"),
    rule(f"{A}q_down_proj.weight qr h", f"{S}q_a_proj.weight qr h", only=COMPRESSED),
    rule(f"{A}q_up_proj.layer_norm_weight qr", f"{S}q_a_layernorm.weight qr", only=COMPRESSED),
    rule(f"{A}q_up_proj.weight (n qd)/tp qr", f"{S}q_b_proj.weight (n qd) qr", only=COMPRESSED),
    rule(f"{A}kv_down_proj.weight [kr rope] h", f"{S}kv_a_proj_with_mqa.weight [kr rope] h"),
    rule(f"{A}kv_up_proj.layer_norm_weight kr", f"{S}kv_a_layernorm.weight kr"),
    rule(f"{A}kv_up_proj.weight (n kvd)/tp kr", f"{S}kv_b_proj.weight (n kvd) kr"),
    rule(f"{A}proj.weight h (n vd)/tp", f"{S}o_proj.weight h (n vd)"),
)
ATTENTION_STATE = (
    (f"{D}input_layernorm", ""),
    (f"{A}q_proj", "q_lora_rank is None"),
    (f"{A}q_down_proj", COMPRESSED),
    (f"{A}q_up_proj", COMPRESSED),
    (f"{A}kv_down_proj", ""),
    (f"{A}kv_up_proj", ""),
    (f"{A}proj", ""),
    ("decoder.final_layernorm", ""),
)

# Fields of megatron-core's MLATransformerConfig.
MODEL = {
    "multi_latent_attention": "True",
    "num_attention_heads": "n",
    "num_query_groups": "n",
    "kv_channels": "vd",
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kr",
    "qk_head_dim": "qk_nope_head_dim",
    "qk_pos_emb_head_dim": "rope",
    "v_head_dim": "vd",
    "qk_layernorm": "True",
    "rope_type": "'yarn' if rope_type == 'yarn' else 'rope'",
    "rotary_scaling_factor": "rope_factor if rope_type == 'yarn' else 1.0",
    "original_max_position_embeddings": "rope_original_max_position_embeddings",
    "beta_fast": "rope_beta_fast",
    "beta_slow": "rope_beta_slow",
    "mscale": "rope_mscale",
    "mscale_all_dim": "rope_mscale_all_dim",
    "rope_scaling": "None",
    "rope_scaling_factor": "None",
    "seq_len_interpolation_factor": "None",
}

# Multi-token prediction: whole layers after the decoder's; Hugging Face counts on, Megatron has a block of its own.
M, N = "mtp.layers.{m}.", "model.layers.{m+l}."
MTP_AXES = {"m": "num_nextn_predict_layers", "eh": "2 * hidden_size"}
MTP_VARIANTS = {"mtp": {"keep": f"{N}eh_proj.weight", "drop": ""}}
MTP_KEYS = {"mtp": {"keep": f"{M}eh_proj.weight", "drop": ""}}
MTP_MODEL = {"mtp_num_layers": "m if mtp == 'keep' else None"}
MTP_OUTGOING = {"mtp == 'drop'": {"num_nextn_predict_layers": 0}}
_HEAD = (
    rule(f"{M}enorm.weight h", f"{N}enorm.weight h"),
    rule(f"{M}hnorm.weight h", f"{N}hnorm.weight h"),
    rule(f"{M}eh_proj.weight h/tp eh", f"{N}eh_proj.weight h eh"),
    rule(f"{M}final_layernorm.weight h", f"{N}shared_head.norm.weight h"),
)
_COPIES = (
    rule("embedding.word_embeddings.weight [vocab pad]/tp h", f"{N}embed_tokens.weight vocab h", alias=True),
    rule("output_layer.weight [vocab pad]/tp h", f"{N}shared_head.head.weight vocab h", alias=True),
)


def predicted(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules of multi-token prediction around those of one decoder layer."""
    inside = moved(layer, mcore=(D, f"{M}transformer_layer."), hf=(H, N))
    return moved(_HEAD + inside, "mtp == 'keep'", stage="last") + moved(_COPIES, "mtp == 'keep'")


def predicted_state(layer: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The modules of multi-token prediction that have an extra state; the attention's own is among them here."""
    names = ("enorm", "hnorm", "eh_proj", "final_layernorm", "transformer_layer.self_attention.core_attention")
    own = tuple((f"{M}{name}", "") for name in names)
    inside = [item for item in moved_state(layer, mcore=(D, f"{M}transformer_layer.")) if item[0].startswith(M)]
    return moved_state((*own, *inside), "mtp == 'keep'")


CHECKS = {
    "rope_type not in (None, 'default', 'yarn')": "megatron-core's latent attention lacks this rope_scaling",
    "rope_interleave is False": "megatron-core's latent attention reads the rotary part in pairs",
}
