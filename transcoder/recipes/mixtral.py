"""Mixtral: Mistral's attention, experts w1 (gate), w3 (up), w2 (down) in every layer."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks, experts

SPARSE = "block_sparse_moe.experts"

RECIPE = Recipe(
    name="mixtral",
    hf={"MixtralForCausalLM": "mixtral"},
    axes=blocks.AXES | {"e": "num_local_experts"} | experts.EXPERT_AXES | {"mf": "intermediate_size"},
    kinds=experts.EVERY_LAYER | {"sliding": blocks.WINDOWED},
    rules=(
        *blocks.EMBED,
        *blocks.ATTENTION,
        *experts.EXPERT_NORM,
        experts.router("block_sparse_moe.gate.weight"),
        *experts.per_expert(SPARSE, "w1", "w3", "w2"),
        *experts.fused(),
        *blocks.FINAL,
    ),
    extra_state=blocks.ATTENTION_STATE + experts.EXPERT_STATE,
    model=blocks.DENSE | blocks.WINDOW | experts.MOE | blocks.NO_BIAS | {"moe_router_pre_softmax": "False"},
    checks=experts.EXPERT_CHECKS,
    hf_variants=experts.expert_variants(f"{SPARSE}.{{e}}.w2.weight"),
    mcore_variants=experts.NORM_VARIANTS,
)
