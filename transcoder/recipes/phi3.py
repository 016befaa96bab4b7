"""Phi-3 and Phi-4: Llama whose files join q, k and v, and gate and up; some rotate only a part of each head."""

from transcoder.recipe import Recipe, rule
from transcoder.recipes import blocks
from transcoder.recipes.blocks import D, H

RECIPE = Recipe(
    name="phi3",
    hf={"Phi3ForCausalLM": "phi3"},
    axes=blocks.AXES,
    rules=(
        *blocks.EMBED,
        *(each for each in blocks.ATTENTION if "linear_qkv.weight" not in each.label),
        rule(
            f"{D}self_attention.linear_qkv.weight (g [(q d) k v])/tp h",
            f"{H}self_attn.qkv_proj.weight [(g q d) (g k) (g v)] h",
        ),
        *(each for each in blocks.GATED_MLP if "linear_fc1.weight" not in each.label),
        rule(f"{D}mlp.linear_fc1.weight [gate/tp up/tp] h", f"{H}mlp.gate_up_proj.weight [gate up] h"),
        *blocks.FINAL,
    ),
    extra_state=blocks.EXTRA_STATE,
    model=blocks.DENSE
    | blocks.NO_BIAS
    | {
        "layernorm_epsilon": "rms_norm_eps or 1e-05",
        "rotary_percent": "partial_rotary_factor or rope_partial_rotary_factor or 1.0",
        "window_size": "(sliding_window - 1, 0) if sliding_window else None",
        "seq_length": "max_position_embeddings or 4096",
    },
    checks=blocks.CHECKS,
)
