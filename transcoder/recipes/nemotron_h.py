"""Nemotron-H: Mamba-2, attention, MLP or experts, one of them in each layer as a pattern of letters says."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts, mamba

RECIPE = Recipe(
    name="nemotron_h",
    hf={"NemotronHForCausalLM": "nemotron_h"},
    axes=blocks.AXES | experts.EXPERT_AXES | mamba.AXES,
    kinds=mamba.KINDS,
    rules=mamba.EMBED
    + moved(mamba.MIXER, "mamba")
    + moved(mamba.ATTENTION, "attends")
    + moved(mamba.MLP, "dense")
    + moved(mamba.EXPERTS, "sparse"),
    extra_state=moved_state(mamba.MIXER_STATE, "mamba")
    + moved_state(blocks.ATTENTION_STATE[:2], "attends")
    + moved_state(blocks.MLP_STATE, "dense")
    + moved_state(mamba.EXPERT_STATE, "sparse")
    + mamba.LAST_STATE,
    model={name: text for name, text in blocks.DENSE.items() if "rope_scaling" not in name}
    | blocks.NO_BIAS
    | mamba.MODEL,
    checks=mamba.CHECKS,
    hf_variants=mamba.HF_VARIANTS,
    mcore_variants={"norm": {"te": ""}},  # megatron-core has no local spec of these layers
)
