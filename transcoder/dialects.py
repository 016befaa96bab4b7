"""Megatron's three key dialects: one rule, three spellings; a dialect moves axes between names and shapes.

    stacked     decoder.layers.mlp.linear_fc1.weight          [L, 2F, H]    what Megatron's own training saves
    per-layer   decoder.layers.0.mlp.linear_fc1.weight        [2F, H]       models whose layers are not alike
    singleton   decoder.layers.0.mlp.linear_fc1.weight_w, _v  [F, H] each   `singleton_local_shards`

Source: megatron/core/transformer/transformer_block.py and mlp.py (apply_swiglu_sharded_factory), 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

from transcoder.errors import refuse
from transcoder.layout import Group, Node, parse
from transcoder.recipe import Recipe, Side

DIALECTS = ("stacked", "per-layer", "singleton")
_PARTS = ("_w", "_v")  # names of the two parts of a gated projection, gate first


def spellings(side: Side, dialect: str) -> tuple[Side, ...]:
    """The stored tensors that hold what `side` describes: one, or one per part of a gated projection."""
    if dialect == "stacked":
        return (_stacked(side),)
    return tuple(_parts(side)) if dialect == "singleton" else (side,)


def _stacked(side: Side) -> Side:
    if "{l}." not in side.name:
        return side
    return Side(side.name.replace("{l}.", "", 1), parse(f"l/each {side.layout.text}"))


def _parts(side: Side) -> Iterator[Side]:
    dims = side.layout.dims
    place = next((i for i, dim in enumerate(dims) if _is_gated(dim)), None)
    if place is None:
        yield side
        return
    for suffix, item in zip(_PARTS, dims[place].items, strict=True):  # type: ignore[union-attr]
        text = " ".join(str(node) for node in (*dims[:place], item, *dims[place + 1 :]))
        yield Side(side.name + suffix, parse(text))


def _is_gated(dim: Node) -> bool:
    return isinstance(dim, Group) and dim.kind == "[" and all(item.mesh for item in dim.items)


def dialect_of(keys: Iterable[str]) -> str:
    """`stacked`, `per-layer` or `singleton`, by the keys. Raises InputError when they fit two or none."""
    names = list(keys)
    numbered = [key for key in names if re.match(r"decoder\.layers\.\d+\.", key)]
    stacked = [key for key in names if re.match(r"decoder\.layers\.[a-z]", key)]
    if bool(numbered) == bool(stacked):
        found = f"{len(numbered)} keys with a layer number, {len(stacked)} without"
        raise refuse("dialect", f"the key dialect is not recognisable: {found}")
    if stacked:
        return "stacked"
    return "singleton" if any(key.endswith(("_w", "_v")) for key in numbered) else "per-layer"


def extra_state_keys(recipe: Recipe, layers: int, dialect: str) -> Iterator[str]:
    """Keys of the objects that a Transformer Engine model asks for, in a dialect."""
    for module, _ in recipe.extra_state:
        if "{l}" not in module:
            yield f"{module}._extra_state/shard_0_1"
        for layer in range(layers) if "{l}" in module else ():
            if dialect == "stacked":
                yield f"{module.replace('{l}.', '')}._extra_state/shard_{layer}_{layers}"
            else:
                yield f"{module.format(l=layer)}._extra_state/shard_0_1"
