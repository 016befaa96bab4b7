"""OLMoE: experts in every layer; the norms of queries and keys run over all heads at once."""

from transcoder.recipe import Recipe, rule
from transcoder.recipes.blocks import ATTENTION, ATTENTION_STATE, AXES, DENSE, EMBED, FINAL, QK_NORM_STATE, D, H
from transcoder.recipes.experts import (
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
    kinds={"sparse": "True"},
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
    model=DENSE
    | MOE
    | {
        "qk_layernorm": "True",
        "add_bias_linear": "False",
        "add_qkv_bias": "False",
        "moe_router_pre_softmax": "not norm_topk_prob",
    },
    checks=EXPERT_CHECKS
    | {
        "clip_qkv is not None": "clip_qkv has no counterpart in megatron-core",
        "clip_qkv is None": "the norm over all query heads is not one of megatron-core's own layer specs",
    },
    hf_variants=expert_variants(),
    mcore_variants=NORM_VARIANTS,
)
