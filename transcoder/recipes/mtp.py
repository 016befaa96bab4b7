"""Rule tuples of multi-token prediction: whole layers after the decoder's, which Megatron keeps in a block of its own.

Stored keys as in megatron/core/transformer/multi_token_prediction.py (0.16), always one key per layer. Hugging Face
files count the layers on after the decoder's, or have a block `mtp.` of their own.
"""

from __future__ import annotations

from transcoder.recipe import Rule, field_of, moved, moved_state, rule
from transcoder.recipes.blocks import D, H

M, INSIDE = "mtp.layers.{m}.", "mtp.layers.{m}.transformer_layer."
KEPT = "mtp == 'keep'"
AXES = {"m": "num_nextn_predict_layers", "eh": "2 * hidden_size"}
MODEL = {"mtp_num_layers": field_of(f"m if {KEPT} else None", num_nextn_predict_layers="mtp_num_layers")}
KEYS = {"mtp": {"keep": f"{M}eh_proj.weight", "drop": ""}}
OUTGOING = {"mtp == 'drop'": {"num_nextn_predict_layers": 0}}


def counted_on(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules around those of a decoder layer, in the names of DeepSeek and GLM: layer L and after, with copies."""
    place = "model.layers.{m+l}."
    copies = (
        rule("embedding.word_embeddings.weight [vocab pad]/tp h", f"{place}embed_tokens.weight vocab h"),
        rule(
            "output_layer.weight [vocab pad]/tp h",
            f"{place}shared_head.head.weight vocab h",
            only="not tie_word_embeddings",
        ),
        rule(
            "embedding.word_embeddings.weight [vocab pad]/tp h",
            f"{place}shared_head.head.weight vocab h",
            only="tie_word_embeddings",
        ),
    )
    head = _head(M, f"{place}enorm", f"{place}hnorm", f"{place}eh_proj", f"{place}shared_head.norm")
    return moved(head + moved(layer, mcore=(D, INSIDE), hf=(H, place)), KEPT, stage="last") + moved(
        copies, KEPT, alias=True
    )


def beside(layer: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """The rules around those of a decoder layer, in the names of Qwen: a block with one of them."""
    head = _head("mtp.layers.0.", "mtp.pre_fc_norm_embedding", "mtp.pre_fc_norm_hidden", "mtp.fc", "mtp.norm")
    return moved(head + moved(layer, mcore=(D, INSIDE), hf=(H, M)), KEPT, stage="last")


def _head(place: str, embedding: str, hidden: str, projection: str, final: str) -> tuple[Rule, ...]:
    return (
        rule(f"{place}enorm.weight h", f"{embedding}.weight h"),
        rule(f"{place}hnorm.weight h", f"{hidden}.weight h"),
        rule(f"{place}eh_proj.weight h/tp eh", f"{projection}.weight h eh"),
        rule(f"{place}final_layernorm.weight h", f"{final}.weight h"),
    )


def shown_by(name: str) -> dict[str, dict[str, str]]:
    """How the files show whether they hold these layers."""
    return {"mtp": {"keep": name, "drop": ""}}


def state(layer: tuple[tuple[str, str], ...]) -> tuple[tuple[str, str], ...]:
    """The modules that have an extra state; the attention's own is among them here."""
    names = ("enorm", "hnorm", "eh_proj", "final_layernorm", "transformer_layer.self_attention.core_attention")
    own = tuple((f"{M}{name}", "") for name in names)
    inside = tuple(item for item in moved_state(layer, mcore=(D, INSIDE)) if item[0].startswith(INSIDE))
    return moved_state(own + inside, KEPT)
