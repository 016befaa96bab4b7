"""Where a live model's tensor is stored when not under the key that the model asks for.

the norm before experts    `pre_mlp_layernorm` (Transformer Engine) or `mlp.linear_fc1.layer_norm_weight` (local)
the norms of latents       `linear_q_up_proj.layer_norm_weight` (Transformer Engine) or `q_layernorm` (local)
layers with numbers        asked one by one, stored as one array: a model with a list as `moe_layer_freq`
`language_model.`          a language model alone, stored as a part of a model with a vision tower
"""

from __future__ import annotations

import re
from collections.abc import Container, Iterable, Iterator

NORMS = (
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
    ("self_attention.q_layernorm.weight", "self_attention.linear_q_up_proj.layer_norm_weight"),
    ("self_attention.kv_layernorm.weight", "self_attention.linear_kv_up_proj.layer_norm_weight"),
)
PART = "language_model."
_NUMBERED = re.compile(r"(.*decoder\.layers\.)(\d+)\.(.+)")
_GROUPS = re.compile(r".*decoder\.layers\.(?:\d+\.(?:mlp\.experts\.experts\.\d+\.)?)?")


def stored_as(asked: str, stored: Container[str]) -> tuple[str, tuple[int, ...]] | None:
    """The stored key, and the index in front of the asked ones that leads to it; None when nothing fits.

    >>> stored_as("decoder.layers.3.pre_mlp_layernorm.weight", {"decoder.layers.mlp.linear_fc1.layer_norm_weight"})
    ('decoder.layers.mlp.linear_fc1.layer_norm_weight', (3,))
    """
    return next((found for found in _spellings(asked) if found[0] in stored), None)


def _spellings(asked: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    for prefix in ("", PART):
        for name in (asked, *_other_norm(asked)):
            yield prefix + name, ()
            if numbered := _NUMBERED.fullmatch(name):
                yield prefix + numbered[1] + numbered[3], (int(numbered[2]),)


def _other_norm(asked: str) -> Iterator[str]:
    for one, other in (pair[::step] for pair in NORMS for step in (1, -1)):
        if asked.startswith("decoder.layers.") and asked.endswith(f".{one}"):
            yield asked.removesuffix(one) + other


def unused(used: set[str], stored: Iterable[str], asked: Iterable[str], first: bool, last: bool) -> list[str]:
    """Stored keys that belong to this rank's pipeline stage and of which the model takes nothing.

    used: the stored keys that it takes. first, last: whether it has the first stage, the last one.
    """
    groups = {match[0] for key in used if (match := _GROUPS.match(key))}
    whole = any(key.startswith(PART) for key in asked) or not any(key.startswith(PART) for key in used)
    return [
        key
        for key in stored
        if key not in used and (whole or key.startswith(PART)) and _belongs(key, groups, first, last)
    ]


def _belongs(key: str, groups: set[str], first: bool, last: bool) -> bool:
    if match := _GROUPS.match(key):
        return match[0] in groups
    name = key.removeprefix(PART)
    return last if name.startswith(("decoder.", "output_layer.", "mtp.")) else first
