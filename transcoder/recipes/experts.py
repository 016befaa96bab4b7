"""Rule tuples of mixtures of experts, for every layer: a recipe moves them under the guard of its sparse layers.

Stored keys as in megatron/core/transformer/moe/experts.py (0.16): the experts are one array, whatever the grid.
"""

from __future__ import annotations

from transcoder.recipe import Rule, field_of, rule
from transcoder.recipes.blocks import CHECKS, D, H

EVERY_LAYER = {"sparse": "True"}
SOME_LAYERS = {"sparse": "l not in (mlp_only_layers or ()) and (l + 1) % (decoder_sparse_step or 1) == 0"}  # of Qwen
SHARED_AXES = {
    "e": "num_experts or num_local_experts",
    "sf": "shared_expert_intermediate_size",
    "sgate": "sf",
    "sup": "sf",
    "one": "1",
}
EXPERT_AXES = {"mf": "moe_intermediate_size", "mgate": "mf", "mup": "mf"}
X = f"{D}mlp.experts.experts.{{e}}."

# Transformer Engine's name of the norm before the experts, and the one that the local layer spec saves it under.
EXPERT_NORM = (
    rule(f"{D}pre_mlp_layernorm.weight h", f"{H}post_attention_layernorm.weight h", only="norm == 'te'"),
    rule(
        f"{D}mlp.linear_fc1.layer_norm_weight h",
        f"{H}post_attention_layernorm.weight h",
        only="norm == 'local'",
    ),
)
EXPERT_BIAS = rule(f"{D}mlp.router.expert_bias e", f"{H}mlp.gate.e_score_correction_bias e", dtype="float32")


def norm_variants(prefix: str = "") -> dict[str, dict[str, str]]:
    """How a checkpoint shows whose norm names it has."""
    return {"norm": {"te": f"{prefix}{D}pre_mlp_layernorm.weight", "local": ""}}


NORM_VARIANTS = norm_variants()


def router(hf: str = "mlp.gate.weight") -> Rule:
    """The router's weight, replicated."""
    return rule(f"{D}mlp.router.weight e h", f"{H}{hf} e h")


def per_expert(
    prefix: str = "mlp.experts", gate: str = "gate_proj", up: str = "up_proj", down: str = "down_proj"
) -> tuple[Rule, ...]:
    """Experts with one Hugging Face tensor per projection and expert."""
    only = "experts == 'per-expert'"
    return (
        rule(
            f"{X}linear_fc1.weight [mgate/etp mup/etp] h",
            f"{H}{prefix}.{{e}}.{gate}.weight mgate h",
            f"{H}{prefix}.{{e}}.{up}.weight mup h",
            only=only,
        ),
        rule(f"{X}linear_fc2.weight h mf/etp", f"{H}{prefix}.{{e}}.{down}.weight h mf", only=only),
    )


def fused(
    prefix: str = "mlp.experts", fc1: str = "gate_up_proj e [mgate mup] h", fc2: str = "down_proj e h mf"
) -> tuple[Rule, ...]:
    """Experts with one Hugging Face tensor per layer."""
    only = "experts == 'fused'"
    return (
        rule(f"{X}linear_fc1.weight [mgate/etp mup/etp] h", f"{H}{prefix}.{fc1}", only=only),
        rule(f"{X}linear_fc2.weight h mf/etp", f"{H}{prefix}.{fc2}", only=only),
    )


def transposed(prefix: str = "mlp.experts") -> tuple[Rule, ...]:
    """Fused experts whose matrices lie the other way round."""
    only = "experts == 'transposed'"
    return (
        rule(f"{X}linear_fc1.weight [mgate/etp mup/etp] h", f"{H}{prefix}.gate_up_proj e h [mgate mup]", only=only),
        rule(f"{X}linear_fc2.weight h mf/etp", f"{H}{prefix}.down_proj e mf h", only=only),
    )


def shared_expert(prefix: str) -> tuple[Rule, ...]:
    """The expert that every token visits."""
    return (
        rule(
            f"{D}mlp.shared_experts.linear_fc1.weight [sgate/tp sup/tp] h",
            f"{H}{prefix}.gate_proj.weight sgate h",
            f"{H}{prefix}.up_proj.weight sup h",
        ),
        rule(f"{D}mlp.shared_experts.linear_fc2.weight h sf/tp", f"{H}{prefix}.down_proj.weight h sf"),
    )


def shared_gate(hf: str = "mlp.shared_expert_gate.weight") -> Rule:
    """The gate of the shared expert: one row."""
    return rule(f"{D}mlp.shared_experts.gate_weight one h", f"{H}{hf} one h")


def expert_variants(
    split: str = "mlp.experts.{e}.down_proj.weight", whole: str = "mlp.experts.down_proj"
) -> dict[str, dict[str, str]]:
    """How the files show which of the two they hold."""
    return {"experts": {"per-expert": f"{H}{split}", "fused": f"{H}{whole}"}}


EXPERT_STATE = (
    (f"{D}pre_mlp_layernorm", "norm == 'te'"),
    (f"{X}linear_fc1", ""),
    (f"{X}linear_fc2", ""),
)

SHARED_STATE = (
    (f"{D}mlp.shared_experts.linear_fc1", ""),
    (f"{D}mlp.shared_experts.linear_fc2", ""),
)

EXPERT_CHECKS = CHECKS | {
    "True": "loading a mixture of experts was not measured with Megatron-LM or Megatron Bridge",
    "num_experts_per_tok == 1": "megatron-core cannot renormalise the probability of one expert",
}

# TransformerConfig fields of a mixture whose router takes a softmax.
MOE = {
    "num_moe_experts": field_of(
        "e", num_experts="num_moe_experts", num_local_experts="num_moe_experts", n_routed_experts="num_moe_experts"
    ),
    "moe_ffn_hidden_size": field_of("mf", moe_intermediate_size="moe_ffn_hidden_size"),
    "moe_router_topk": field_of("num_experts_per_tok", num_experts_per_tok="moe_router_topk"),
    "moe_router_load_balancing_type": "'aux_loss'",
    "moe_aux_loss_coeff": field_of("router_aux_loss_coef or 0.001", router_aux_loss_coef="moe_aux_loss_coeff"),
    "moe_grouped_gemm": "True",
    "moe_token_dispatcher_type": "'alltoall'",
    "moe_layer_freq": field_of(
        "1 if all_sparse else sparse_layers",
        mlp_only_layers="places(moe_layer_freq, 0)",
        first_k_dense_replace="len(places(moe_layer_freq, 0)) or 0",
    ),
    "moe_router_pre_softmax": field_of("not norm_topk_prob", norm_topk_prob="not moe_router_pre_softmax"),
}

SHARED_GATE = {
    "moe_shared_expert_intermediate_size": field_of(
        "sf", shared_expert_intermediate_size="moe_shared_expert_intermediate_size"
    ),
    "moe_shared_expert_gate": "True",
}

# Mixtures in the manner of DeepSeek: dense layers first, then routed and shared experts.
AFTER_DENSE = {"sparse": "l >= (first_k_dense_replace or 0) and l % (moe_layer_freq or 1) == 0"}
ROUTED_AXES = {
    "e": "n_routed_experts",
    "sf": "n_shared_experts * moe_intermediate_size",
    "sgate": "sf",
    "sup": "sf",
}
TE_NORMS = {"norm": {"te": f"{D}pre_mlp_layernorm.weight"}}
_GROUPS = "n_group is not None and n_group != 1 and topk_method not in ('greedy',)"
GROUP_CHECKS = EXPERT_CHECKS | {
    "topk_method == 'group_limited_greedy' and topk_group and num_experts_per_tok // topk_group != 1": "megatron-core"
    " ranks a group by the sum of several of its experts, DeepSeek V2 by the best one",
    "norm_topk_prob": "DeepSeek V2 never renormalises, whatever norm_topk_prob says",
}
GROUPED = {
    "moe_router_dtype": "'fp32'",
    "moe_shared_expert_intermediate_size": field_of(
        "sf", n_shared_experts="moe_shared_expert_intermediate_size // moe_ffn_hidden_size"
    ),
    "moe_router_num_groups": field_of(f"n_group if {_GROUPS} else None", n_group="moe_router_num_groups"),
    "moe_router_group_topk": field_of(f"topk_group if {_GROUPS} else None", topk_group="moe_router_group_topk"),
    "moe_router_topk_scaling_factor": field_of(
        "routed_scaling_factor", routed_scaling_factor="moe_router_topk_scaling_factor"
    ),
}
SOFTMAX_OF_ALL = {"moe_router_pre_softmax": "True"}
SIGMOID = GROUPED | {
    "moe_router_score_function": "'sigmoid'",
    "moe_router_enable_expert_bias": "True",
    "moe_router_load_balancing_type": "'seq_aux_loss'",
    "moe_aux_loss_coeff": "0.0001",
    "moe_router_pre_softmax": "False",
}
SIGMOID_CHECKS = EXPERT_CHECKS | {
    "norm_topk_prob is False": "megatron-core always renormalises the scores of a sigmoid",
    "scoring_func not in (None, 'sigmoid')": "scoring_func is not sigmoid",
}

# GPT-OSS: a softmax over the chosen experts, clamped quick-GELU, learnable softmax offset, every other layer windowed.
GPT_OSS = {
    "add_bias_linear": "True",
    "add_qkv_bias": "True",
    "activation_func": "'megatron.core.activations.quick_gelu'",
    "activation_func_clamp_value": "swiglu_limit or 7.0",
    "glu_linear_offset": "1.0",
    "softmax_type": "'learnable'",
    "window_size": "(sliding_window - 1, 0) if sliding_window else None",
    "window_attn_skip_freq": "2",
    "moe_router_pre_softmax": "False",
    "moe_router_load_balancing_type": "'none'",
    "position_embedding_type": "'yarn' if rope_type == 'yarn' else 'rope'",
    "yarn_rotary_scaling_factor": "rope_factor",
    "yarn_original_max_position_embeddings": "rope_original_max_position_embeddings",
    "yarn_beta_fast": "rope_beta_fast",
    "yarn_beta_slow": "rope_beta_slow",
    "yarn_correction_range_round_to_int": "rope_truncate",
}
GPT_OSS_CHECKS = {reason: EXPERT_CHECKS[reason] for reason in ("True", "num_experts_per_tok == 1")}

# Router, experts and shared experts in the names of DeepSeek, without a bias and with one.
ROUTED = (router(), *per_expert(), *fused(), *shared_expert("mlp.shared_experts"))
BIASED = (*EXPERT_NORM, *ROUTED, EXPERT_BIAS)
