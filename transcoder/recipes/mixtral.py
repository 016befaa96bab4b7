"""Mixtral: Mistral's attention, experts w1 (gate), w3 (up), w2 (down) in every layer."""

from transcoder.recipe import Recipe
from transcoder.recipes.blocks import ATTENTION, ATTENTION_STATE, AXES, DENSE, EMBED, FINAL, NO_BIAS
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

SPARSE = "block_sparse_moe.experts"

RECIPE = Recipe(
    name="mixtral",
    hf={"MixtralForCausalLM": "mixtral"},
    axes=AXES | {"e": "num_local_experts"} | EXPERT_AXES | {"mf": "intermediate_size"},
    kinds=EVERY_LAYER,
    rules=(
        *EMBED,
        *ATTENTION,
        *EXPERT_NORM,
        router("block_sparse_moe.gate.weight"),
        *per_expert(SPARSE, "w1", "w3", "w2"),
        *fused(),
        *FINAL,
    ),
    extra_state=ATTENTION_STATE + EXPERT_STATE,
    model=DENSE | MOE | NO_BIAS | {"moe_router_pre_softmax": "False"},
    checks=EXPERT_CHECKS,
    hf_variants=expert_variants(f"{SPARSE}.{{e}}.w2.weight"),
    mcore_variants=NORM_VARIANTS,
)
