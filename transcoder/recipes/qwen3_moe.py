"""Qwen3 mixtures of experts: Qwen3's attention, and experts in all layers but those that the config makes dense."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import (
    ATTENTION,
    ATTENTION_STATE,
    AXES,
    DENSE,
    EMBED,
    FINAL,
    NO_BIAS,
    QK_NORM,
    QK_NORM_STATE,
    gated_mlp,
    mlp_state,
)
from transcoder.recipes.experts import (
    EXPERT_AXES,
    EXPERT_CHECKS,
    EXPERT_NORM,
    EXPERT_STATE,
    MOE,
    NORM_VARIANTS,
    SOME_LAYERS,
    expert_variants,
    fused,
    per_expert,
    router,
)

RECIPE = Recipe(
    name="qwen3_moe",
    hf={"Qwen3MoeForCausalLM": "qwen3_moe"},
    axes=AXES
    | {"d": "head_dim or hidden_size // num_attention_heads", "e": "num_experts or num_local_experts"}
    | EXPERT_AXES,
    kinds=SOME_LAYERS,
    rules=(
        *EMBED,
        *ATTENTION,
        *QK_NORM,
        *gated_mlp("not sparse"),
        *EXPERT_NORM,
        router(),
        *per_expert(),
        *fused(),
        *FINAL,
    ),
    extra_state=ATTENTION_STATE + QK_NORM_STATE + mlp_state("not sparse") + EXPERT_STATE,
    model=DENSE | MOE | NO_BIAS | {"qk_layernorm": "True"},
    checks=EXPERT_CHECKS,
    hf_variants=expert_variants(),
    mcore_variants=NORM_VARIANTS,
)
