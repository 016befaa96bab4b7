"""Names of a live Megatron module's tensors → keys of a distributed checkpoint, as `sharded_state_dict` spells them.

Sources, megatron-core 0.16: transformer/moe/experts.py (experts one by one or grouped), models/gpt/gpt_layer_specs.py
(`sharded_state_dict_keys_map` of the local layer spec), tensor_parallel/layers.py and extensions/transformer_engine.py
(which axis ranks cut).
"""

from __future__ import annotations

import re
from collections.abc import Container

_LAYER = re.compile(r"((?:.*\.)?decoder\.layers\.)(\d+)\.(.+)")
_EXPERT = re.compile(r"(.*mlp\.experts\.)(?:local_experts\.(\d+)\.)?(linear_fc[12]\.(?:weight|bias))(\d*)((?:_[wv])?)")
_ROWS = ("linear_proj.weight", "linear_fc2.weight", "out_proj.weight")  # the second axis is cut
_WHOLE = ("layer_norm_weight", "layer_norm_bias", "layernorm.weight", "norm.weight", "router.weight", "gate_weight")
_COLUMNS = re.compile(
    r".*(linear_qkv|linear_fc1|linear_q_proj|linear_q_up_proj|linear_kv_up_proj|eh_proj|in_proj|conv1d"
    r"|word_embeddings|output_layer)\.(weight|bias)|.*mixer\.(dt_bias|A_log|D)"
)
LEGACY_EXPERTS = re.compile(r".*mlp\.experts\.weight[12]")


# Names of the classes before megatron-core (megatron/legacy/model/{language_model,transformer}.py of Megatron-LM 0.12).
_OLDER = (
    (r"language_model\.(encoder|transformer)\.layers\.", "decoder.layers."),
    (r"language_model\.(encoder|transformer)\.final_(?:layer)?norm\.", "decoder.final_layernorm."),
    (r"language_model\.(embedding|output_layer)\.", r"\1."),
    (r"\.input_(?:layer)?norm\.", ".self_attention.linear_qkv.layer_norm_"),
    (r"\.post_attention_(?:layer)?norm\.", ".mlp.linear_fc1.layer_norm_"),
    (r"\.(?:self_)?attention\.query_key_value\.", ".self_attention.linear_qkv."),
    (r"\.(?:self_)?attention\.dense\.", ".self_attention.linear_proj."),
    (r"\.mlp\.dense_h_to_4h\.", ".mlp.linear_fc1."),
    (r"\.mlp\.dense_4h_to_h\.", ".mlp.linear_fc2."),
)


def newer_name(name: str) -> str:
    """The name that megatron-core gives a tensor of an older class, which lies there as it did before.

    >>> newer_name("language_model.encoder.layers.3.input_norm.weight")
    'decoder.layers.3.self_attention.linear_qkv.layer_norm_weight'
    """
    for pattern, text in _OLDER:
        name = re.sub(pattern, text, name)
    return name


def renumbered(name: str, first: int) -> str:
    """The name with its decoder layer counted from `first`.

    >>> renumbered("decoder.layers.1.mlp.linear_fc1.weight", 4)
    'decoder.layers.5.mlp.linear_fc1.weight'
    """
    found = _LAYER.fullmatch(name)
    return f"{found[1]}{int(found[2]) + first}.{found[3]}" if found else name


def layer_of(name: str) -> int:
    """The number of the decoder layer that a name spells; -1 for none."""
    found = _LAYER.fullmatch(name)
    return int(found[2]) if found else -1


def stored_key(name: str, others: Container[str]) -> tuple[str, int]:
    """The per-layer key of a tensor, and which of the rank's experts it is (-1 for none).

    others: all names, which tell a norm that a layer keeps by itself from one that its linear has.

    >>> stored_key("decoder.layers.0.mlp.experts.local_experts.3.linear_fc2.weight", ())
    ('decoder.layers.0.mlp.experts.experts.linear_fc2.weight', 3)
    >>> stored_key("decoder.layers.0.input_layernorm.weight", {"decoder.layers.0.self_attention.linear_qkv.weight"})
    ('decoder.layers.0.self_attention.linear_qkv.layer_norm_weight', -1)
    """
    expert = _EXPERT.fullmatch(name)
    if expert and (number := expert[2] or expert[4]):
        return f"{expert[1]}experts.{expert[3]}{expert[5]}", int(number)
    for norm, linear in (("input_layernorm", "self_attention.linear_qkv"), ("pre_mlp_layernorm", "mlp.linear_fc1")):
        stem, found, kind = name.partition(f".{norm}.")
        if found and f"{stem}.{linear}.weight" in others:
            return f"{stem}.{linear}.layer_norm_{kind}", -1
    return name, -1


def cut_axis(key: str) -> int:
    """The axis that tensor-parallel ranks cut; -1 for tensors that all of them have. As far as names tell."""
    if key.endswith(_WHOLE):
        return -1
    return 1 if key.endswith(_ROWS) else 0 if _COLUMNS.fullmatch(key) else -1
