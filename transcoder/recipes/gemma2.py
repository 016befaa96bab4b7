"""Gemma 2: norms on both sides of attention and feed-forward, stored less one; soft-capped logits; tied."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import AXES, DENSE, EMBED, FINAL, NO_BIAS, SCALED_EMBEDDING, UNMATCHED, WINDOW
from transcoder.recipes.postnorm import POST_NORM_STATE, SANDWICH

GEMMA = NO_BIAS | {"layernorm_zero_centered_gamma": "True", "activation_func": "'megatron.core.activations.fast_gelu'"}
GEMMA_CHECKS = {
    "(hidden_activation or 'gelu_pytorch_tanh') != 'gelu_pytorch_tanh'": "hidden_activation is not gelu_pytorch_tanh",
    "use_bidirectional_attention": f"use_bidirectional_attention {UNMATCHED}",
}

RECIPE = Recipe(
    name="gemma2",
    hf={"Gemma2ForCausalLM": "gemma2"},
    defaults={"tie_word_embeddings": True, "sliding_window": 4096},
    axes=AXES | {"d": "head_dim or 256"},
    kinds={"sliding": "layer_types[l] == 'sliding_attention' if layer_types else l % 2 == 0"},
    rules=EMBED + SANDWICH + FINAL,
    extra_state=POST_NORM_STATE,
    model=DENSE
    | WINDOW
    | GEMMA
    | {
        "_target_": "'megatron.bridge.models.gemma.gemma2_provider.Gemma2ModelProvider'",
        "query_pre_attn_scalar": "query_pre_attn_scalar or 256",
        "softmax_scale": "(query_pre_attn_scalar or 256) ** -0.5",
        "attn_logit_softcapping": "attn_logit_softcapping",
        "final_logit_softcapping": "final_logit_softcapping",
        "seq_length": "max_position_embeddings or 8192",
    },
    runs=SCALED_EMBEDDING,
    checks=GEMMA_CHECKS
    | {
        "True": "soft-capped logits, scaled embeddings and norms after the blocks need Megatron Bridge's Gemma 2",
        "attn_logit_softcapping is None": "no attn_logit_softcapping in the config: Megatron Bridge takes 50",
        "final_logit_softcapping is None": "no final_logit_softcapping in the config: Megatron Bridge takes 30",
        "rope_type is not None and rope_type != 'default'": "rope_scaling is not carried over",
    },
)
