"""OLMo 2 and 3: norms only after attention and feed-forward; queries and keys normalised over all heads at once."""

from transcoder.recipe import Recipe
from transcoder.recipes import blocks
from transcoder.recipes.blocks import BIASES, CHECKS, EMBED, FINAL, QK_NORM_STATE, WIDE_QK_NORM
from transcoder.recipes.postnorm import ATTENTION_LINEARS, MLP_LINEARS, POST_NORM_STATE, POST_NORMS

RECIPE = Recipe(
    name="olmo2",
    hf={"Olmo2ForCausalLM": "olmo2", "Olmo3ForCausalLM": "olmo3"},
    defaults={"sliding_window": 4096},
    axes=blocks.AXES,
    kinds={
        "sliding": "model_type == 'olmo3' and"
        " (layer_types[l] == 'sliding_attention' if layer_types else (l + 1) % 4 != 0)"
    },
    rules=EMBED + ATTENTION_LINEARS + BIASES + WIDE_QK_NORM + MLP_LINEARS + POST_NORMS + FINAL,
    extra_state=POST_NORM_STATE + QK_NORM_STATE,
    model=blocks.DENSE
    | blocks.WINDOW
    | {
        "qk_layernorm": "True",
        "layernorm_epsilon": "rms_norm_eps or 1e-05",
        "rotary_base": "rope_theta or rope_full_attention_rope_theta or"
        " (500000.0 if model_type == 'olmo3' else 10000.0)",
    },
    runs={
        "late_rounding": "True",
        "wide_rotation": "True",
        "local_rotary_base": "(rope_sliding_attention_rope_theta or rope_theta or 500000.0)"
        " if model_type == 'olmo3' and any_sliding else None",
    },
    checks={
        "True": "norms after the blocks, and over all heads, are not in megatron-core's own layer specs",
        "model_type == 'olmo3'": blocks.UNCARRIED_WINDOW,
        "(rope_full_attention_rope_type or 'default') != 'default'": "rope_scaling is not carried over",
        "rope_full_attention_rope_theta != rope_sliding_attention_rope_theta": "there are two rotary bases",
    }
    | {test: reason for test, reason in CHECKS.items() if "sliding_window" not in test},
)
