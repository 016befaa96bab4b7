"""The text model of Gemma 3: Gemma 2 with norms of queries and keys, no soft-caps, windows in five layers of six."""

from __future__ import annotations

from transcoder.recipes.blocks import AXES as DENSE_AXES
from transcoder.recipes.blocks import DENSE, EMBED, FINAL, QK_NORM, QK_NORM_STATE, SCALED_EMBEDDING
from transcoder.recipes.gemma2 import GEMMA, GEMMA_CHECKS
from transcoder.recipes.postnorm import POST_NORM_STATE, SANDWICH

RULES = EMBED + SANDWICH + QK_NORM + FINAL
STATE = POST_NORM_STATE + QK_NORM_STATE
AXES = DENSE_AXES | {  # with the defaults of Gemma3TextConfig, which released files leave out
    "g": "num_key_value_heads or 4",
    "q": "(num_attention_heads or 8) // g if (num_attention_heads or 8) % g == 0 else None",
    "d": "head_dim or 256",
    "vocab": "vocab_size or 262208",
}
MODEL = (
    DENSE
    | GEMMA
    | {
        "qk_layernorm": "True",
        "softmax_scale": "(query_pre_attn_scalar or 256) ** -0.5",
        "window_size": "sliding_window or 4096",  # Megatron Bridge's Gemma 3 counts the token itself
        "interleaved_attn_pattern": "layer_types or ((_sliding_window_pattern or sliding_window_pattern or 6) - 1, 1)",
        "rotary_base": "rope_theta or rope_full_attention_rope_theta or 1000000.0",
        "rotary_base_local": "rope_local_base_freq or rope_sliding_attention_rope_theta or 10000.0",
        "seq_len_interpolation_factor": "None",  # Gemma's own field scales the global rotation alone
        "rope_scaling_factor": "rope_factor or rope_full_attention_factor or 1.0",
        "seq_length": "max_position_embeddings or 131072",
    }
)
RUNS = SCALED_EMBEDDING | {"logits_softcap": "final_logit_softcapping"}
CHECKS = GEMMA_CHECKS | {
    "True": "two rotary bases, scaled embeddings and norms after the blocks need Megatron Bridge's Gemma 3",
    "attn_logit_softcapping or final_logit_softcapping": "logit softcapping is not carried over",
    "(rope_type or rope_full_attention_rope_type or 'default') not in ('default', 'linear')": "rope_scaling is not"
    " carried over",
    "(rope_sliding_attention_rope_type or 'default') != 'default'": "rope_scaling of windows is not carried over",
}
