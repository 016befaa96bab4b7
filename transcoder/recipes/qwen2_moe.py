"""Qwen2 mixtures of experts: Qwen2's attention, and beside the experts a shared one behind a gate."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import (
    ATTENTION,
    ATTENTION_STATE,
    AXES,
    DENSE,
    EMBED,
    FINAL,
    gated_mlp,
    mlp_state,
    qkv_bias,
)
from transcoder.recipes.experts import (
    EXPERT_AXES,
    EXPERT_CHECKS,
    EXPERT_NORM,
    EXPERT_STATE,
    MOE,
    NORM_VARIANTS,
    SHARED_STATE,
    SOME_LAYERS,
    expert_variants,
    fused,
    per_expert,
    router,
    shared_expert,
    shared_gate,
)

RECIPE = Recipe(
    name="qwen2_moe",
    hf={"Qwen2MoeForCausalLM": "qwen2_moe"},
    axes=AXES
    | {"e": "num_experts or num_local_experts", "sf": "shared_expert_intermediate_size", "sgate": "sf", "sup": "sf"}
    | {"one": "1"}
    | EXPERT_AXES,
    kinds=SOME_LAYERS,
    rules=(
        *EMBED,
        *ATTENTION,
        qkv_bias("qkv_bias is not False"),
        *gated_mlp("not sparse"),
        *EXPERT_NORM,
        router(),
        *per_expert(),
        *fused(),
        *shared_expert("mlp.shared_expert"),
        shared_gate(),
        *FINAL,
    ),
    extra_state=ATTENTION_STATE + mlp_state("not sparse") + EXPERT_STATE + SHARED_STATE,
    model=DENSE
    | MOE
    | {
        "add_bias_linear": "False",
        "add_qkv_bias": "qkv_bias is not False",
        "moe_shared_expert_intermediate_size": "sf",
        "moe_shared_expert_gate": "True",
    },
    checks=EXPERT_CHECKS,
    hf_variants=expert_variants(),
    mcore_variants=NORM_VARIANTS,
)
