"""GPT-OSS: biases everywhere, sinks, alternating gate and up rows; experts lie transposed in BF16 files alone."""

from transcoder.recipe import Recipe, rule
from transcoder.recipes import blocks, experts
from transcoder.recipes.blocks import D, H
from transcoder.recipes.experts import X

FC1, FC2, E = f"{X}linear_fc1.weight [(mf og)/etp (mf ou)/etp] h", f"{X}linear_fc2.weight h mf/etp", f"{H}mlp.experts."
TRANSPOSED, MXFP4 = "experts == 'transposed'", "experts == 'mxfp4'"
EXPERTS = (
    rule(f"{D}mlp.router.weight e h", f"{H}mlp.router.weight e h"),
    rule(f"{D}mlp.router.bias e", f"{H}mlp.router.bias e"),
    rule(FC1, f"{E}gate_up_proj e h (mf [og ou])", only=TRANSPOSED),
    rule(FC2, f"{E}down_proj e mf h", only=TRANSPOSED),
    rule(FC1, f"{E}gate_up_proj_blocks e (mf [og ou]) h", only=MXFP4),
    rule(FC2, f"{E}down_proj_blocks e h mf", only=MXFP4),
    rule(f"{X}linear_fc1.bias [(mf og)/etp (mf ou)/etp]", f"{E}gate_up_proj_bias e (mf [og ou])"),
    rule(f"{X}linear_fc2.bias h", f"{E}down_proj_bias e h"),
)
ATTENTION = (
    *blocks.ATTENTION,
    blocks.qkv_bias(),
    rule(f"{D}self_attention.linear_proj.bias h", f"{H}self_attn.o_proj.bias h"),
    rule(f"{D}self_attention.core_attention.softmax_offset (g q)/tp", f"{H}self_attn.sinks (g q)", dtype="float32"),
)

RECIPE = Recipe(
    name="gpt_oss",
    hf={"GptOssForCausalLM": "gpt_oss"},
    axes=blocks.AXES | {"e": "num_local_experts", "mf": "intermediate_size", "og": "1", "ou": "1"},
    kinds=experts.EVERY_LAYER,
    rules=(*blocks.EMBED, *ATTENTION, *experts.EXPERT_NORM, *EXPERTS, *blocks.FINAL),
    extra_state=((f"{D}self_attention.core_attention", ""), *blocks.ATTENTION_STATE, *experts.EXPERT_STATE),
    model=blocks.DENSE | experts.MOE | experts.GPT_OSS,
    runs={"late_rounding": "True"},
    checks=experts.GPT_OSS_CHECKS,
    hf_variants={"experts": {"transposed": f"{E}gate_up_proj", "mxfp4": f"{E}gate_up_proj_blocks"}},
    mcore_variants=experts.NORM_VARIANTS,
)
