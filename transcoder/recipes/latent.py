"""Rule tuples of multi-latent attention.

Stored keys as in megatron/core/transformer/multi_latent_attention.py (0.16): the input norm stays separate, the norms
of the latents are fused into the projections after them.
"""

from __future__ import annotations

from transcoder.recipe import field_of, rule
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
    "num_attention_heads": field_of("n", num_attention_heads="num_attention_heads"),
    "num_query_groups": field_of("n", num_key_value_heads="num_query_groups"),
    "kv_channels": "vd",
    "q_lora_rank": field_of("q_lora_rank", q_lora_rank="q_lora_rank"),
    "kv_lora_rank": field_of("kr", kv_lora_rank="kv_lora_rank"),
    "qk_head_dim": field_of("qk_nope_head_dim", qk_nope_head_dim="qk_head_dim"),
    "qk_pos_emb_head_dim": field_of("rope", qk_rope_head_dim="qk_pos_emb_head_dim"),
    "v_head_dim": field_of("vd", v_head_dim="v_head_dim"),
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

CHECKS = {
    "rope_type not in (None, 'default', 'yarn')": "megatron-core's latent attention lacks this rope_scaling",
    "rope_interleave is False": "megatron-core's latent attention reads the rotary part in pairs",
}
