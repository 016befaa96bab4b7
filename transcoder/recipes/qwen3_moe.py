"""Qwen3 mixtures of experts: Qwen3's attention, and experts in all layers but those that the config makes dense."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts

SPARSE = (*experts.EXPERT_NORM, experts.router(), *experts.per_expert(), *experts.fused())

RECIPE = Recipe(
    name="qwen3_moe",
    hf={"Qwen3MoeForCausalLM": "qwen3_moe"},
    axes=blocks.AXES | {"e": "num_experts or num_local_experts"} | experts.EXPERT_AXES,
    kinds=experts.SOME_LAYERS | {"sliding": blocks.QWEN_WINDOWED},
    rules=blocks.EMBED
    + blocks.ATTENTION
    + blocks.QK_NORM
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(SPARSE, "sparse")
    + blocks.FINAL,
    extra_state=blocks.ATTENTION_STATE
    + blocks.QK_NORM_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(experts.EXPERT_STATE, "sparse"),
    model=blocks.DENSE | blocks.WINDOW | experts.MOE | blocks.NO_BIAS | {"qk_layernorm": "True"},
    checks=experts.EXPERT_CHECKS,
    hf_variants=experts.expert_variants(),
    mcore_variants=experts.NORM_VARIANTS,
)
