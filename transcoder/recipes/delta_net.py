"""Rule tuples of the gated DeltaNet, a linear attention.

Hugging Face groups its projections by key head; Megatron stores each part under a key of its own. Stored keys as in
megatron/core/ssm/gated_delta_net.py (0.16).
"""

from __future__ import annotations

from transcoder.recipe import field_of, rule
from transcoder.recipes.blocks import D, H

A, N = f"{D}self_attention.", f"{H}linear_attn."

# Key heads, value heads for each of them, and the sizes of a query, key, value and output gate.
AXES = {
    "nk": "linear_num_key_heads",
    "nr": "linear_num_value_heads // nk if linear_num_value_heads % nk == 0 else None",
    "nb": "nr",
    "na": "nr",
    "kq": "linear_key_head_dim",
    "kk": "kq",
    "kv": "linear_value_head_dim",
    "kz": "kv",
    "kc": "linear_conv_kernel_dim or 4",
    "one": "1",
}
KINDS = {
    "linear": "layer_types[l] == 'linear_attention' if layer_types else (l + 1) % (full_attention_interval or 4) != 0"
}
RULES = (
    rule(f"{A}in_proj.layer_norm_weight h", f"{H}input_layernorm.weight h"),
    rule(
        (
            f"{A}in_proj.weight.query (nk kq)/tp h",
            f"{A}in_proj.weight.key (nk kk)/tp h",
            f"{A}in_proj.weight.value (nk nr kv)/tp h",
            f"{A}in_proj.weight.z (nk nr kz)/tp h",
        ),
        f"{N}in_proj_qkvz.weight (nk [kq kk (nr kv) (nr kz)]) h",
    ),
    rule(
        (f"{A}in_proj.weight.beta (nk nb)/tp h", f"{A}in_proj.weight.alpha (nk na)/tp h"),
        f"{N}in_proj_ba.weight (nk [nb na]) h",
    ),
    rule(
        (
            f"{A}conv1d.weight.query (nk kq)/tp one kc",
            f"{A}conv1d.weight.key (nk kk)/tp one kc",
            f"{A}conv1d.weight.value (nk nr kv)/tp one kc",
        ),
        f"{N}conv1d.weight [(nk kq) (nk kk) (nk nr kv)] one kc",
    ),
    rule(f"{A}A_log (nk nr)/tp", f"{N}A_log (nk nr)"),
    rule(f"{A}dt_bias (nk nr)/tp", f"{N}dt_bias (nk nr)"),
    rule(f"{A}out_norm.weight kv", f"{N}norm.weight kv", plus=-1),
    rule(f"{A}out_proj.weight h (nk nr kv)/tp", f"{N}out_proj.weight h (nk nr kv)"),
)
STATE = ((f"{A}in_proj", ""), (f"{A}out_norm", ""), (f"{A}out_proj", ""))
MODEL = {
    "qk_layernorm": "True",
    "layernorm_zero_centered_gamma": "True",
    "attention_output_gate": "True",
    "rotary_percent": "partial_rotary_factor or rope_partial_rotary_factor or 0.25",
    "experimental_attention_variant": "'gated_delta_net'",
    "linear_attention_freq": field_of(
        "full_attention_interval or 4 if not layer_types else linear_layers",
        full_attention_interval="linear_attention_freq if len(linear_attention_freq) is None else None",
    ),
    "linear_conv_kernel_dim": field_of("kc", linear_conv_kernel_dim="linear_conv_kernel_dim"),
    "linear_key_head_dim": field_of("kq", linear_key_head_dim="linear_key_head_dim"),
    "linear_value_head_dim": field_of("kv", linear_value_head_dim="linear_value_head_dim"),
    "linear_num_key_heads": field_of("nk", linear_num_key_heads="linear_num_key_heads"),
    "linear_num_value_heads": field_of("nk * nr", linear_num_value_heads="linear_num_value_heads"),
}
