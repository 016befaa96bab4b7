"""Qwen3-VL mixtures: Qwen3's mixture under a prefix.

The experts of a layer are one tensor, transposed in released files, not in those that transformers 5 saves.
"""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts
from transcoder.recipes import qwen3_tower as tower

SPARSE = (*experts.EXPERT_NORM, experts.router(), *experts.transposed(), *experts.fused(), *experts.per_expert())
MLP = moved(blocks.GATED_MLP, "not sparse") + moved(SPARSE, "sparse")
TEXT = blocks.EMBED + blocks.ATTENTION + blocks.QK_NORM + MLP + blocks.FINAL
MLP_STATE = moved_state(blocks.MLP_STATE, "not sparse") + moved_state(experts.EXPERT_STATE, "sparse")
STATE = blocks.ATTENTION_STATE + blocks.QK_NORM_STATE + MLP_STATE
INSIDE, HF, X = (
    ("", "language_model."),
    ("model.", "model.language_model."),
    "model.language_model.layers.{l}.mlp.experts.",
)

RECIPE = Recipe(
    name="qwen3_vl_moe",
    hf={"Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe"},
    axes=blocks.AXES | {"e": "num_experts or num_local_experts"} | experts.EXPERT_AXES | tower.AXES,
    kinds=experts.SOME_LAYERS,
    rules=moved(TEXT, mcore=INSIDE, hf=HF) + tower.RULES,
    extra_state=moved_state(STATE, mcore=INSIDE) + tower.STATE,
    model=blocks.DENSE | experts.MOE | tower.MODEL | {"moe_router_pre_softmax": "False"},
    checks=experts.EXPERT_CHECKS | tower.CHECKS,
    hf_variants={
        "experts": {
            "transposed": f"{X}gate_up_proj e h [mgate mup]",
            "fused": f"{X}gate_up_proj e [mgate mup] h",
            "per-expert": f"{X}{{e}}.down_proj.weight",
        }
    },
    mcore_variants=experts.norm_variants("language_model."),
)
