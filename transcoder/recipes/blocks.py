"""Rule tuples that recipes share. Stored Megatron names as in megatron-core 0.16 with Transformer Engine norms.

Layouts: QKV as in megatron/core/transformer/attention.py (query groups in order, each its heads, then k, then v);
gate and up as in megatron/core/transformer/mlp.py (all gate rows, then all up rows).
"""

from __future__ import annotations

from transcoder.recipe import Rule, field_of, rule

AXES = {
    "l": "num_hidden_layers",
    "h": "hidden_size",
    "g": "num_key_value_heads or num_attention_heads",
    "q": "num_attention_heads // g if num_attention_heads % g == 0 else None",  # no rest
    "d": "head_dim or hidden_size // num_attention_heads",
    "k": "d",
    "v": "d",
    "f": "intermediate_size",
    "gate": "f",
    "up": "f",
    "vocab": "vocab_size",
}

H, D = "model.layers.{l}.", "decoder.layers.{l}."

EMBED = (
    rule("embedding.word_embeddings.weight [vocab pad]/tp h", "model.embed_tokens.weight vocab h"),
    rule(
        "output_layer.weight [vocab pad]/tp h",
        "lm_head.weight vocab h",
        only="not tie_word_embeddings",
        stage="last",
    ),
)
FINAL = (rule("decoder.final_layernorm.weight h", "model.norm.weight h", stage="last"),)

ATTENTION = (
    rule(f"{D}self_attention.linear_qkv.layer_norm_weight h", f"{H}input_layernorm.weight h"),
    rule(
        f"{D}self_attention.linear_qkv.weight (g [(q d) k v])/tp h",
        f"{H}self_attn.q_proj.weight (g q d) h",
        f"{H}self_attn.k_proj.weight (g k) h",
        f"{H}self_attn.v_proj.weight (g v) h",
    ),
    rule(f"{D}self_attention.linear_proj.weight h (g q d)/tp", f"{H}self_attn.o_proj.weight h (g q d)"),
)

GATED_ATTENTION = (  # each query head followed by the gate of its output
    ATTENTION[0],
    rule(
        f"{D}self_attention.linear_qkv.weight (g [(q d) (q dz) k v])/tp h",
        f"{H}self_attn.q_proj.weight (g q [d dz]) h",
        f"{H}self_attn.k_proj.weight (g k) h",
        f"{H}self_attn.v_proj.weight (g v) h",
    ),
    *ATTENTION[2:],
)


def qkv_bias(only: str = "") -> Rule:
    """The bias of the fused QKV, under a guard."""
    return rule(
        f"{D}self_attention.linear_qkv.bias (g [(q d) k v])/tp",
        f"{H}self_attn.q_proj.bias (g q d)",
        f"{H}self_attn.k_proj.bias (g k)",
        f"{H}self_attn.v_proj.bias (g v)",
        only=only,
    )


# megatron-core has one switch for the biases of all linears: where Hugging Face has only some, the others are zero.
BIASES = (
    qkv_bias("attention_bias"),
    rule(
        f"{D}self_attention.linear_qkv.bias (zero_g [(zero_q zero_d) zero_k zero_v])/tp",
        only="mlp_bias and not attention_bias",
    ),
    rule(f"{D}self_attention.linear_proj.bias h", f"{H}self_attn.o_proj.bias h", only="attention_bias"),
    rule(f"{D}self_attention.linear_proj.bias zero_h", only="mlp_bias and not attention_bias"),
    rule(
        f"{D}mlp.linear_fc1.bias [gate/tp up/tp]",
        f"{H}mlp.gate_proj.bias gate",
        f"{H}mlp.up_proj.bias up",
        only="mlp_bias",
    ),
    rule(f"{D}mlp.linear_fc1.bias [zero_gate/tp zero_up/tp]", only="attention_bias and not mlp_bias"),
    rule(f"{D}mlp.linear_fc2.bias h", f"{H}mlp.down_proj.bias h", only="mlp_bias"),
    rule(f"{D}mlp.linear_fc2.bias zero_h", only="attention_bias and not mlp_bias"),
)

QK_NORM = (
    rule(f"{D}self_attention.q_layernorm.weight d", f"{H}self_attn.q_norm.weight d"),
    rule(f"{D}self_attention.k_layernorm.weight d", f"{H}self_attn.k_norm.weight d"),
)


WIDE_QK_NORM = (  # over all heads at once
    rule(f"{D}self_attention.q_layernorm.weight (g q d)", f"{H}self_attn.q_norm.weight (g q d)"),
    rule(f"{D}self_attention.k_layernorm.weight (g k)", f"{H}self_attn.k_norm.weight (g k)"),
)

GATED_MLP = (
    rule(f"{D}mlp.linear_fc1.layer_norm_weight h", f"{H}post_attention_layernorm.weight h"),
    rule(
        f"{D}mlp.linear_fc1.weight [gate/tp up/tp] h",
        f"{H}mlp.gate_proj.weight gate h",
        f"{H}mlp.up_proj.weight up h",
    ),
    rule(f"{D}mlp.linear_fc2.weight h f/tp", f"{H}mlp.down_proj.weight h f"),
)

# Modules for which a Transformer Engine model asks for `_extra_state`, and a guard.
ATTENTION_STATE = (
    (f"{D}self_attention.linear_qkv", ""),
    (f"{D}self_attention.linear_proj", ""),
    ("decoder.final_layernorm", ""),
)
MLP_STATE = ((f"{D}mlp.linear_fc1", ""), (f"{D}mlp.linear_fc2", ""))
EXTRA_STATE = ATTENTION_STATE + MLP_STATE
QK_NORM_STATE = ((f"{D}self_attention.q_layernorm", ""), (f"{D}self_attention.k_layernorm", ""))

# Fields of megatron-core's TransformerConfig, as expressions over the axes and the config.
DENSE = {
    "num_layers": field_of("l", num_hidden_layers="num_layers"),
    "hidden_size": field_of("h", hidden_size="hidden_size"),
    "ffn_hidden_size": field_of("f", intermediate_size="ffn_hidden_size"),
    "num_attention_heads": field_of("g * q", num_attention_heads="num_attention_heads"),
    "num_query_groups": field_of("g", num_key_value_heads="num_query_groups"),
    "kv_channels": field_of("d", head_dim="kv_channels"),
    "vocab_size": field_of("vocab", vocab_size="vocab_size or padded_vocab_size"),
    "share_embeddings_and_output_weights": field_of(
        "not not tie_word_embeddings", tie_word_embeddings="share_embeddings_and_output_weights"
    ),
    "normalization": "'RMSNorm'",
    "layernorm_epsilon": field_of("rms_norm_eps or 1e-06", rms_norm_eps="layernorm_epsilon"),
    "gated_linear_unit": "True",
    "add_bias_linear": field_of("not not (attention_bias or mlp_bias)", mlp_bias="add_bias_linear"),
    "add_qkv_bias": field_of("not not attention_bias", attention_bias="add_qkv_bias"),
    "qk_layernorm": "False",
    "position_embedding_type": "'rope'",
    "rotary_base": field_of("rope_theta or 10000.0", rope_theta="rotary_base"),
    "seq_length": field_of("max_position_embeddings or 2048", max_position_embeddings="seq_length"),
    "rope_scaling": "True if rope_type == 'llama3' else None",
    "rope_scaling_factor": "rope_factor if rope_type == 'llama3' else None",
    "seq_len_interpolation_factor": "rope_factor if rope_type == 'linear' else None",
}

# Attention to a window of tokens, in the layers of the kind `sliding`.
WINDOW = {
    "window_size": field_of("(sliding_window - 1, 0) if any_sliding else None", sliding_window="window_size[0] + 1"),
    "window_attn_skip_freq": "sliding_layers if any_sliding else None",
}
SCALED_EMBEDDING = {"embedding_multiplier": "h ** 0.5", "inner_multiplier": "True"}  # for `runs`
WINDOWED = "sliding_window is not None"
QWEN_WINDOWED = f"use_sliding_window and {WINDOWED}"
QWEN_DEFAULTS = {"max_window_layers": 28}
UNCARRIED_WINDOW = "Megatron-LM does not take the sliding window from a checkpoint: give --window-size"


def sliding(windows: str, without_list: str = "l >= max_window_layers") -> dict[str, str]:
    """The kind of layers with a window, for a model that has windows at all; as a list in the config says, if any."""
    return {"sliding": f"{windows} and (layer_types[l] == 'sliding_attention' if layer_types else {without_list})"}


USE_QK_NORM = field_of("not not use_qk_norm", use_qk_norm="qk_layernorm")
NO_BIAS = {"add_bias_linear": "False", "add_qkv_bias": "False"}

# Conditions under which the weights are right but a field of the config has no counterpart that was measured.
UNMATCHED = "has no counterpart in megatron-core"  # what then cannot be run either
CHECKS = {
    "rope_type not in (None, 'default', 'llama3', 'linear')": "this rope_scaling has no counterpart that was measured",
    "rope_type in ('llama3', 'linear')": "rope_scaling was not measured with Megatron-LM or Megatron Bridge",
    "rope_type == 'llama3' and (rope_low_freq_factor, rope_high_freq_factor, rope_original_max_position_embeddings)"
    " != (1, 4, 8192)": "megatron-core's llama3 rope has the fixed constants 1, 4 and 8192",
    "sliding_window is not None and use_sliding_window is not False": UNCARRIED_WINDOW,
    "hidden_act is not None and hidden_act != 'silu'": "hidden_act is not silu",
}
