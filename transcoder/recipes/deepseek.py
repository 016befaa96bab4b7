"""DeepSeek V2, V3 and R1, Kimi K2: latent attention, dense first layers, shared experts, multi-token prediction."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts, latent, mtp

LAYER = (*latent.ATTENTION, *experts.BIASED)
STATE = experts.EXPERT_STATE + experts.SHARED_STATE

RECIPE = Recipe(
    name="deepseek",
    hf={"DeepseekV3ForCausalLM": "deepseek_v3", "KimiK2ForCausalLM": "kimi_k2"},
    axes=blocks.AXES | latent.AXES | experts.EXPERT_AXES | experts.ROUTED_AXES | mtp.AXES,
    kinds=experts.AFTER_DENSE,
    rules=blocks.EMBED
    + latent.ATTENTION
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(experts.BIASED, "sparse")
    + mtp.counted_on(LAYER)
    + blocks.FINAL,
    extra_state=latent.ATTENTION_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(STATE, "sparse")
    + mtp.state(latent.ATTENTION_STATE + STATE),
    model=blocks.DENSE | experts.MOE | blocks.NO_BIAS | experts.SIGMOID | latent.MODEL | mtp.MODEL,
    checks=experts.SIGMOID_CHECKS | latent.CHECKS,
    ignore=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
    hf_variants=experts.expert_variants() | mtp.shown_by("model.layers.{m+l}.*"),
    mcore_variants=experts.TE_NORMS | mtp.KEYS,
    outgoing=mtp.OUTGOING,
)
