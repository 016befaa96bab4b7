"""Qwen3-VL mixtures: Qwen3's mixture under a prefix.

The experts of a layer are one tensor, transposed in released files, not in those that transformers 5 saves.
"""

from transcoder.recipe import Recipe, moved, moved_state, rule
from transcoder.recipes import blocks, experts
from transcoder.recipes.blocks import H
from transcoder.recipes.qwen3_vl import TOWER, TOWER_AXES, TOWER_STATE, VL_CHECKS, VL_MODEL

FC1, FC2 = f"{experts.X}linear_fc1.weight [mgate/etp mup/etp] h", f"{experts.X}linear_fc2.weight h mf/etp"
TRANSPOSED = "experts == 'transposed'"
EXPERTS = (
    *experts.EXPERT_NORM,
    experts.router(),
    rule(FC1, f"{H}mlp.experts.gate_up_proj e h [mgate mup]", only=TRANSPOSED),
    rule(FC2, f"{H}mlp.experts.down_proj e mf h", only=TRANSPOSED),
    *experts.fused(),
    *experts.per_expert(),
)
TEXT = (
    blocks.EMBED
    + blocks.ATTENTION
    + blocks.QK_NORM
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(EXPERTS, "sparse")
    + blocks.FINAL
)
STATE = (
    blocks.ATTENTION_STATE
    + blocks.QK_NORM_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(experts.EXPERT_STATE, "sparse")
)
X = "model.language_model.layers.{l}.mlp.experts."

RECIPE = Recipe(
    name="qwen3_vl_moe",
    hf={"Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe"},
    axes=blocks.AXES | {"e": "num_experts or num_local_experts"} | experts.EXPERT_AXES | TOWER_AXES,
    kinds=experts.SOME_LAYERS,
    rules=moved(TEXT, mcore=("", "language_model."), hf=("model.", "model.language_model.")) + TOWER,
    extra_state=moved_state(STATE, mcore=("", "language_model.")) + TOWER_STATE,
    model=blocks.DENSE | experts.MOE | VL_MODEL | {"moe_router_pre_softmax": "False"},
    checks=experts.EXPERT_CHECKS | VL_CHECKS,
    hf_variants={
        "experts": {
            "transposed": f"{X}gate_up_proj e h [mgate mup]",
            "fused": f"{X}gate_up_proj e [mgate mup] h",
            "per-expert": f"{X}{{e}}.down_proj.weight",
        }
    },
    mcore_variants={
        "norm": {name: key and f"language_model.{key}" for name, key in experts.NORM_VARIANTS["norm"].items()}
    },
)
