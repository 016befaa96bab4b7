"""GLM-4.5: grouped-query attention, dense first layers, a sigmoid router, shared experts, multi-token prediction."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts, mtp

ATTENTION = (*blocks.ATTENTION, blocks.qkv_bias("attention_bias"), *moved(blocks.QK_NORM, "use_qk_norm"))
ATTENTION_STATE = blocks.ATTENTION_STATE + moved_state(blocks.QK_NORM_STATE, "use_qk_norm")
STATE = experts.EXPERT_STATE + experts.SHARED_STATE

RECIPE = Recipe(
    name="glm4_moe",
    hf={"Glm4MoeForCausalLM": "glm4_moe"},
    axes=blocks.AXES | experts.EXPERT_AXES | experts.ROUTED_AXES | mtp.AXES,
    kinds=experts.AFTER_DENSE,
    rules=blocks.EMBED
    + ATTENTION
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(experts.BIASED, "sparse")
    + mtp.counted_on((*ATTENTION, *experts.BIASED))
    + blocks.FINAL,
    extra_state=ATTENTION_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(STATE, "sparse")
    + mtp.state(ATTENTION_STATE + STATE),
    model=blocks.DENSE
    | experts.MOE
    | experts.SIGMOID
    | mtp.MODEL
    | {
        "add_bias_linear": "False",
        "qk_layernorm": blocks.USE_QK_NORM,
        "rotary_percent": "partial_rotary_factor or rope_partial_rotary_factor or 0.5",
    },
    checks=experts.SIGMOID_CHECKS,
    hf_variants=experts.expert_variants() | mtp.shown_by("model.layers.{m+l}.*"),
    mcore_variants=experts.NORM_VARIANTS | mtp.KEYS,
    outgoing=mtp.OUTGOING,
)
