"""OLMoE: experts in every layer; the norms of queries and keys run over all heads at once."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks, experts

RECIPE = Recipe(
    name="olmoe",
    hf={"OlmoeForCausalLM": "olmoe"},
    axes=blocks.AXES | {"e": "num_experts or num_local_experts"} | experts.EXPERT_AXES | {"mf": "intermediate_size"},
    kinds=experts.EVERY_LAYER,
    rules=(
        *blocks.EMBED,
        *blocks.ATTENTION,
        *blocks.WIDE_QK_NORM,
        *experts.EXPERT_NORM,
        experts.router(),
        *experts.per_expert(),
        *experts.fused(),
        *blocks.FINAL,
    ),
    extra_state=blocks.ATTENTION_STATE + blocks.QK_NORM_STATE + experts.EXPERT_STATE,
    model=blocks.DENSE | experts.MOE | blocks.NO_BIAS | {"qk_layernorm": "True"},
    checks=experts.EXPERT_CHECKS
    | {
        "clip_qkv is not None": f"clip_qkv {blocks.UNMATCHED}",
        "clip_qkv is None": "the norm over all query heads is not one of megatron-core's own layer specs",
    },
    hf_variants=experts.expert_variants(),
    mcore_variants=experts.NORM_VARIANTS,
)
