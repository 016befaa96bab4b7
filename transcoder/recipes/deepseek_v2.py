"""DeepSeek V2 and V2-Lite: latent attention, dense first layers, shared experts, a softmax over groups of experts."""

from transcoder.recipe import Recipe, moved, moved_state
from transcoder.recipes import blocks, experts, latent

RECIPE = Recipe(
    name="deepseek_v2",
    hf={"DeepseekV2ForCausalLM": "deepseek_v2"},
    axes=blocks.AXES | latent.AXES | experts.EXPERT_AXES | experts.ROUTED_AXES,
    kinds=experts.AFTER_DENSE,
    rules=blocks.EMBED
    + latent.ATTENTION
    + moved(blocks.GATED_MLP, "not sparse")
    + moved(experts.EXPERT_NORM + experts.ROUTED, "sparse")
    + blocks.FINAL,
    extra_state=latent.ATTENTION_STATE
    + moved_state(blocks.MLP_STATE, "not sparse")
    + moved_state(experts.EXPERT_STATE + experts.SHARED_STATE, "sparse"),
    model=blocks.DENSE | experts.MOE | blocks.NO_BIAS | experts.GROUPED | latent.MODEL | experts.SOFTMAX_OF_ALL,
    checks=experts.GROUP_CHECKS | latent.CHECKS,
    ignore=("model.layers.{l}.self_attn.rotary_emb.inv_freq",),
    hf_variants=experts.expert_variants(),
    mcore_variants=experts.TE_NORMS,
)
