"""Qwen2 mixtures of experts: Qwen2's attention, and beside the experts a shared one behind a gate."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts

SHARED = (*experts.shared_expert("mlp.shared_expert"), experts.shared_gate())
SPARSE = (*experts.EXPERT_NORM, experts.router(), *experts.per_expert(), *experts.fused(), *SHARED)

RECIPE = Recipe(
    name="qwen2_moe",
    hf={"Qwen2MoeForCausalLM": "qwen2_moe"},
    defaults=blocks.QWEN_DEFAULTS,
    axes=blocks.AXES | experts.EXPERT_AXES | experts.SHARED_AXES,
    kinds=experts.SOME_LAYERS | blocks.sliding(blocks.QWEN_WINDOWED, "l % 2 == 0 and l < max_window_layers"),
    rules=(
        *blocks.EMBED,
        *blocks.ATTENTION,
        blocks.qkv_bias("qkv_bias is not False"),
        *moved(blocks.GATED_MLP, "not sparse"),
        *moved(SPARSE, "sparse"),
        *blocks.FINAL,
    ),
    extra_state=blocks.ATTENTION_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(experts.EXPERT_STATE + experts.SHARED_STATE, "sparse"),
    model=blocks.DENSE
    | blocks.WINDOW
    | experts.MOE
    | experts.SHARED_GATE
    | {"add_bias_linear": "False", "add_qkv_bias": "qkv_bias is not False"},
    checks=experts.EXPERT_CHECKS,
    hf_variants=experts.expert_variants(),
    mcore_variants=experts.NORM_VARIANTS,
)
