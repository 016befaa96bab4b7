"""OLMoE: experts in every layer; the norms of queries and keys run over all heads at once."""

from transcoder.recipe import Recipe, rule
from transcoder.recipes.blocks import (
    ATTENTION,
    ATTENTION_STATE,
    AXES,
    DENSE,
    EMBED,
    FINAL,
    NO_BIAS,
    QK_NORM_STATE,
    D,
    H,
)
from transcoder.recipes.experts import (
    EVERY_LAYER,
    EXPERT_AXES,
    EXPERT_CHECKS,
    EXPERT_NORM,
    EXPERT_STATE,
    MOE,
    NORM_VARIANTS,
    expert_variants,
    fused,
    per_expert,
    router,
)

RECIPE = Recipe(
    name="olmoe",
    hf={"OlmoeForCausalLM": "olmoe"},
    axes=AXES | {"e": "num_experts or num_local_experts"} | EXPERT_AXES | {"mf": "intermediate_size"},
    kinds=EVERY_LAYER,
    rules=(
        *EMBED,
        *ATTENTION,
        rule(f"{D}self_attention.q_layernorm.weight (g q d)", f"{H}self_attn.q_norm.weight (g q d)"),
        rule(f"{D}self_attention.k_layernorm.weight (g k)", f"{H}self_attn.k_norm.weight (g k)"),
        *EXPERT_NORM,
        router(),
        *per_expert(),
        *fused(),
        *FINAL,
    ),
    extra_state=ATTENTION_STATE + QK_NORM_STATE + EXPERT_STATE,
    model=DENSE | MOE | NO_BIAS | {"qk_layernorm": "True"},
    checks=EXPERT_CHECKS
    | {
        "clip_qkv is not None": "clip_qkv has no counterpart in megatron-core",
        "clip_qkv is None": "the norm over all query heads is not one of megatron-core's own layer specs",
    },
    hf_variants=expert_variants(),
    mcore_variants=NORM_VARIANTS,
)
