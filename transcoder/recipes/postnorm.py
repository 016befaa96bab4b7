"""Rule tuples of layers with norms after attention and feed-forward; stored names of Megatron Bridge.

The modules are its TERowParallelLinearLayerNorm: megatron-core itself has no norm there.
"""

from transcoder.recipe import rule
from transcoder.recipes.blocks import ATTENTION, ATTENTION_STATE, GATED_MLP, MLP_STATE, D, H

ATTENTION_LINEARS, MLP_LINEARS = ATTENTION[1:], GATED_MLP[1:]  # each without the norm before it
POST_NORMS = (
    rule(f"{D}self_attention.linear_proj.post_layernorm.weight h", f"{H}post_attention_layernorm.weight h"),
    rule(f"{D}mlp.linear_fc2.post_layernorm.weight h", f"{H}post_feedforward_layernorm.weight h"),
)
SANDWICH = (  # norms on both sides, as in Gemma
    *ATTENTION,
    rule(f"{D}mlp.linear_fc1.layer_norm_weight h", f"{H}pre_feedforward_layernorm.weight h"),
    *MLP_LINEARS,
    *POST_NORMS,
)
POST_NORM_STATE = (
    *ATTENTION_STATE,
    *MLP_STATE,
    (f"{D}self_attention.linear_proj.post_layernorm", ""),
    (f"{D}mlp.linear_fc2.post_layernorm", ""),
)
