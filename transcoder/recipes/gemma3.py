"""Gemma 3: Gemma 2 with norms of queries and keys and no soft-caps; five layers of six see a window."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import AXES, DENSE, EMBED, FINAL, QK_NORM, QK_NORM_STATE
from transcoder.recipes.gemma2 import GEMMA, GEMMA_CHECKS
from transcoder.recipes.postnorm import POST_NORM_STATE, SANDWICH

TEXT = EMBED + SANDWICH + QK_NORM + FINAL
TEXT_STATE = POST_NORM_STATE + QK_NORM_STATE
TEXT_AXES = AXES | {  # with the defaults of Gemma3TextConfig, which released files leave out
    "g": "num_key_value_heads or 4",
    "q": "(num_attention_heads or 8) // g if (num_attention_heads or 8) % g == 0 else None",
    "d": "head_dim or 256",
    "vocab": "vocab_size or 262208",
}
TEXT_MODEL = (
    DENSE
    | GEMMA
    | {
        "qk_layernorm": "True",
        "softmax_scale": "0.0625 if (query_pre_attn_scalar or 256) == 256 else"
        " 0.07715167498104596 if query_pre_attn_scalar == 168 else None",
        "window_size": "sliding_window or 4096",  # Megatron Bridge's Gemma 3 counts the token itself
        "interleaved_attn_pattern": "layer_types or ((_sliding_window_pattern or sliding_window_pattern or 6) - 1, 1)",
        "rotary_base": "rope_theta or rope_full_attention_rope_theta or 1000000.0",
        "rotary_base_local": "rope_local_base_freq or rope_sliding_attention_rope_theta or 10000.0",
        "seq_len_interpolation_factor": "None",  # Gemma's own field scales the global rotation alone
        "rope_scaling_factor": "rope_factor or rope_full_attention_factor or 1.0",
        "seq_length": "max_position_embeddings or 131072",
    }
)
TEXT_CHECKS = GEMMA_CHECKS | {
    "True": "two rotary bases, scaled embeddings and norms after the blocks need Megatron Bridge's Gemma 3",
    "(query_pre_attn_scalar or 256) not in (256, 168)": "query_pre_attn_scalar is not carried over",
    "attn_logit_softcapping or final_logit_softcapping": "logit softcapping is not carried over",
    "(rope_type or rope_full_attention_rope_type or 'default') not in ('default', 'linear')": "rope_scaling is not"
    " carried over",
    "(rope_sliding_attention_rope_type or 'default') != 'default'": "rope_scaling of windows is not carried over",
}

RECIPE = Recipe(
    name="gemma3",
    hf={"Gemma3ForCausalLM": "gemma3_text"},
    axes=TEXT_AXES,
    rules=TEXT,
    extra_state=TEXT_STATE,
    model=TEXT_MODEL | {"_target_": "'megatron.bridge.models.gemma.gemma3_provider.Gemma3ModelProvider'"},
    checks=TEXT_CHECKS,
)
