"""Qwen3-Next: gated DeltaNet in three layers of four, gated attention in the others, experts in all of them.

Norms are zero-centred on both sides, but for the one inside the DeltaNet, which only Megatron stores less one.
"""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, delta_net, experts, mtp

GATED = (*blocks.GATED_ATTENTION, *blocks.QK_NORM)
SHARED = (*experts.shared_expert("mlp.shared_expert"), experts.shared_gate())
SPARSE = (*experts.EXPERT_NORM, experts.router(), *experts.per_expert(), *experts.fused(), *SHARED)
STATE = experts.EXPERT_STATE + experts.SHARED_STATE
FULL_STATE = blocks.ATTENTION_STATE[:2] + blocks.QK_NORM_STATE

RECIPE = Recipe(
    name="qwen3_next",
    hf={"Qwen3NextForCausalLM": "qwen3_next"},
    axes=blocks.AXES | delta_net.AXES | experts.EXPERT_AXES | experts.SHARED_AXES | mtp.AXES | {"m": "1", "dz": "d"},
    kinds=delta_net.KINDS | experts.SOME_LAYERS,
    rules=blocks.EMBED
    + moved(GATED, "not linear")
    + moved(delta_net.RULES, "linear")
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(SPARSE, "sparse")
    + mtp.beside((*GATED, *SPARSE))
    + blocks.FINAL,
    extra_state=moved_state(FULL_STATE, "not linear")
    + moved_state(delta_net.STATE, "linear")
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(STATE, "sparse")
    + mtp.state(FULL_STATE + STATE)
    + blocks.ATTENTION_STATE[2:],
    model=blocks.DENSE | experts.MOE | blocks.NO_BIAS | experts.SHARED_GATE | delta_net.MODEL | mtp.MODEL,
    checks=experts.EXPERT_CHECKS,
    hf_variants=experts.expert_variants() | mtp.shown_by("mtp.*"),
    mcore_variants=experts.TE_NORMS | mtp.KEYS,
)
