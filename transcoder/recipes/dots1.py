"""dots.llm1: attention of Qwen3, then dense first layers, a sigmoid router and shared experts as in DeepSeek-V3."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts

WINDOW = (  # from layer max_window_layers on, where layer_types does not say it
    "sliding_window is not None and"
    " ('sliding_attention' in layer_types if layer_types else max_window_layers < num_hidden_layers)"
)

RECIPE = Recipe(
    name="dots1",
    hf={"Dots1ForCausalLM": "dots1"},
    defaults={"max_window_layers": 62},
    axes=blocks.AXES | experts.EXPERT_AXES | experts.ROUTED_AXES,
    kinds=experts.AFTER_DENSE | blocks.sliding(blocks.WINDOWED),
    rules=blocks.EMBED
    + blocks.ATTENTION
    + blocks.QK_NORM
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(experts.BIASED, "sparse")
    + blocks.FINAL,
    extra_state=blocks.ATTENTION_STATE
    + blocks.QK_NORM_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(experts.EXPERT_STATE + experts.SHARED_STATE, "sparse"),
    model=blocks.DENSE | blocks.WINDOW | blocks.NO_BIAS | experts.MOE | experts.SIGMOID | {"qk_layernorm": "True"},
    checks={test: reason for test, reason in experts.SIGMOID_CHECKS.items() if "sliding_window" not in test}
    | {
        "norm_topk_prob is None": "a config without norm_topk_prob does not renormalise, megatron-core always does",
        WINDOW: blocks.UNCARRIED_WINDOW,
    },
    hf_variants=experts.expert_variants(),
    mcore_variants=experts.NORM_VARIANTS,
)
