"""Rule tuples of Mamba-2 hybrids in the names of Nemotron-H.

The rows of Hugging Face's projections are sections one after another; Megatron stores each under a key of its own.
Stored keys as in megatron/core/ssm/mamba_mixer.py and models/mamba (0.16), always one key per layer.
"""

from __future__ import annotations

from transcoder.recipe import field_of, moved, rule
from transcoder.recipes import blocks
from transcoder.recipes.blocks import D
from transcoder.recipes.experts import EXPERT_CHECKS, X

B = "backbone.layers.{l}."
M, N = f"{D}mixer.", f"{B}mixer."

AXES = {
    "l": "num_hidden_layers or len(layers_block_type)",
    "mh": "mamba_num_heads",
    "mt": "mh",
    "mz": "mamba_head_dim",
    "mx": "mz",
    "ng": "n_groups",
    "sb": "ssm_state_size",
    "sc": "sb",
    "ck": "conv_kernel or 4",
    "one": "1",
    "e": "n_routed_experts",
    "xh": "moe_latent_size or hidden_size",
    "sf": "moe_shared_expert_intermediate_size",
}
KINDS = {
    kind: f"hybrid_override_pattern[l] == '{letter}' if hybrid_override_pattern else layers_block_type[l] in {names}"
    for kind, letter, names in (
        ("mamba", "M", ("linear_attention", "mamba")),
        ("attends", "*", ("full_attention", "attention")),
        ("dense", "-", ("mlp",)),
        ("sparse", "E", ("moe",)),
    )
}
EMBED = (
    rule("embedding.word_embeddings.weight [vocab pad]/tp h", "backbone.embeddings.weight vocab h"),
    blocks.EMBED[1],
    rule("decoder.final_norm.weight h", "backbone.norm_f.weight h", stage="last"),
)
_CONV = ("(mh mx)", "(ng sb)", "(ng sc)")
MIXER = (
    rule(f"{M}in_proj.layer_norm_weight h", f"{B}norm.weight h"),
    rule(
        (
            f"{M}in_proj.weight.z (mh mz)/tp h",
            f"{M}in_proj.weight.x (mh mx)/tp h",
            f"{M}in_proj.weight.B (ng sb)/tp h",
            f"{M}in_proj.weight.C (ng sc)/tp h",
            f"{M}in_proj.weight.dt mt/tp h",
        ),
        f"{N}in_proj.weight [(mh mz) (mh mx) (ng sb) (ng sc) mt] h",
    ),
    rule(
        tuple(f"{M}conv1d.weight.{name} {rows}/tp one ck" for name, rows in zip("xBC", _CONV, strict=True)),
        f"{N}conv1d.weight [{' '.join(_CONV)}] one ck",
    ),
    rule(
        tuple(f"{M}conv1d.bias.{name} {rows}/tp" for name, rows in zip("xBC", _CONV, strict=True)),
        f"{N}conv1d.bias [{' '.join(_CONV)}]",
        only="use_conv_bias is not False",
    ),
    rule(f"{M}A_log mh/tp", f"{N}A_log mh", dtype="float32"),
    rule(f"{M}D mh/tp", f"{N}D mh", dtype="float32"),
    rule(f"{M}dt_bias mh/tp", f"{N}dt_bias mh"),
    rule(f"{M}norm.weight (mh mx)/tp", f"{N}norm.weight (mh mx)"),
    rule(f"{M}out_proj.weight h (mh mx)/tp", f"{N}out_proj.weight h (mh mx)"),
)
ATTENTION = (
    rule(f"{D}self_attention.linear_qkv.layer_norm_weight h", f"{B}norm.weight h"),
    *moved(blocks.ATTENTION[1:], hf=(f"{blocks.H}self_attn.", N)),
)
MLP = (
    rule(f"{D}mlp.linear_fc1.layer_norm_weight h", f"{B}norm.weight h"),
    rule(f"{D}mlp.linear_fc1.weight f/tp h", f"{N}up_proj.weight f h"),
    rule(f"{D}mlp.linear_fc2.weight h f/tp", f"{N}down_proj.weight h f"),
)
_SPLIT, _FUSED, _LATENT = "experts == 'per-expert'", "experts == 'fused'", "moe_latent_size is not None"
EXPERTS = (
    rule(f"{D}pre_mlp_layernorm.weight h", f"{B}norm.weight h"),
    rule(f"{D}mlp.router.weight e h", f"{N}gate.weight e h"),
    rule(f"{D}mlp.router.expert_bias e", f"{N}gate.e_score_correction_bias e", dtype="float32"),
    rule(f"{X}linear_fc1.weight mf/etp xh", f"{N}experts.{{e}}.up_proj.weight mf xh", only=_SPLIT),
    rule(f"{X}linear_fc2.weight xh mf/etp", f"{N}experts.{{e}}.down_proj.weight xh mf", only=_SPLIT),
    rule(f"{X}linear_fc1.weight mf/etp xh", f"{N}experts.up_proj e mf xh", only=_FUSED),
    rule(f"{X}linear_fc2.weight xh mf/etp", f"{N}experts.down_proj e xh mf", only=_FUSED),
    rule(f"{D}mlp.shared_experts.linear_fc1.weight sf/tp h", f"{N}shared_experts.up_proj.weight sf h"),
    rule(f"{D}mlp.shared_experts.linear_fc2.weight h sf/tp", f"{N}shared_experts.down_proj.weight h sf"),
    rule(f"{D}mlp.fc1_latent_proj.weight xh h", f"{N}fc1_latent_proj.weight xh h", only=_LATENT),
    rule(f"{D}mlp.fc2_latent_proj.weight h xh", f"{N}fc2_latent_proj.weight h xh", only=_LATENT),
)
MIXER_STATE = ((f"{M}in_proj", ""), (f"{M}out_proj", ""))
EXPERT_STATE = (
    (f"{D}pre_mlp_layernorm", ""),
    (f"{X}linear_fc1", ""),
    (f"{X}linear_fc2", ""),
    (f"{D}mlp.shared_experts.linear_fc1", ""),
    (f"{D}mlp.shared_experts.linear_fc2", ""),
    (f"{D}mlp.fc1_latent_proj", _LATENT),
    (f"{D}mlp.fc2_latent_proj", _LATENT),
)
LAST_STATE = (("decoder.final_norm", ""), ("output_layer", ""))

# One letter for each layer, as both sides write it; lists of kinds are newer on the Hugging Face side.
HF_VARIANTS = {
    "experts": {"per-expert": f"{N}experts.{{e}}.down_proj.weight", "fused": f"{N}experts.down_proj", "none": ""}
}
MODEL = {
    "layernorm_epsilon": field_of(
        "layer_norm_epsilon or rms_norm_eps or 1e-05", layer_norm_epsilon="layernorm_epsilon"
    ),
    "gated_linear_unit": "False",
    "activation_func": "'megatron.core.activations.squared_relu'",
    "position_embedding_type": "'none'",
    "is_hybrid_model": "True",
    "hybrid_override_pattern": field_of("hybrid_override_pattern", hybrid_override_pattern="hybrid_override_pattern"),
    "mamba_num_heads": field_of("mh", mamba_num_heads="mamba_num_heads"),
    "mamba_head_dim": field_of("mz", mamba_head_dim="mamba_head_dim"),
    "mamba_num_groups": field_of("ng", n_groups="mamba_num_groups"),
    "mamba_state_dim": field_of("sb", ssm_state_size="mamba_state_dim"),
    "num_moe_experts": field_of("e if any_sparse else None", n_routed_experts="num_moe_experts"),
    "moe_ffn_hidden_size": field_of("mf if any_sparse else None", moe_intermediate_size="moe_ffn_hidden_size"),
    "moe_shared_expert_intermediate_size": field_of(
        "sf if any_sparse else None", moe_shared_expert_intermediate_size="moe_shared_expert_intermediate_size"
    ),
    "moe_latent_size": field_of("moe_latent_size", moe_latent_size="moe_latent_size"),
    "moe_router_topk": "num_experts_per_tok if any_sparse else None",
    "moe_router_topk_scaling_factor": "routed_scaling_factor if any_sparse else None",
    "moe_router_score_function": "'sigmoid' if any_sparse else None",
    "moe_router_enable_expert_bias": "True if any_sparse else None",
    "moe_router_num_groups": "n_group if any_sparse and n_group and n_group != 1 else None",
    "moe_router_group_topk": "topk_group if any_sparse and n_group and n_group != 1 else None",
}
CHECKS = {
    "True": "Mamba hybrids were not measured with Megatron-LM or Megatron Bridge",
    "hybrid_override_pattern is None": "layers_block_type is not written as a pattern of letters",
    "num_experts_per_tok == 1": EXPERT_CHECKS["num_experts_per_tok == 1"],
}
