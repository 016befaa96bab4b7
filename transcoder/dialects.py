"""Megatron's three key dialects: one rule, three spellings; a dialect moves axes between names and shapes.

    stacked     decoder.layers.mlp.linear_fc1.weight          [L, 2F, H]    what Megatron's own training saves
    per-layer   decoder.layers.0.mlp.linear_fc1.weight        [2F, H]       models whose layers are not alike
    singleton   decoder.layers.0.mlp.linear_fc1.weight_w, _v  [F, H] each   `singleton_local_shards`

Experts are a leading dimension, after the layers, in the first two, and numbered in the name in the third.

Source: megatron/core/transformer/transformer_block.py and mlp.py (apply_swiglu_sharded_factory), 0.16.1.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import product as combinations

from transcoder.errors import refuse
from transcoder.layout import parse
from transcoder.notation import Group, Node
from transcoder.recipe import Side

DIALECTS = ("stacked", "per-layer", "singleton")
# Axes that become leading dimensions: layers (of the decoder, of a Megatron vision tower, its side branches), experts.
_MOVED = {"stacked": ("l", "t", "s", "e"), "per-layer": ("e",), "singleton": ()}
_DECODER = r"(?:language_model\.)?decoder\.layers\."
_SINGLE = re.compile(r"_[wv]$|\.experts\.experts\.\d+\.")
_PARTS = ("_w", "_v")  # names of the two parts of a gated projection, gate first


def spellings(side: Side, dialect: str) -> tuple[Side, ...]:
    """The stored tensors that hold what `side` describes: one, or one per part of a gated projection.

    `side` is written with layer and expert in its name, as `decoder.layers.{l}.mlp.experts.experts.{e}.…`.
    """
    if dialect == "singleton":
        return tuple(_parts(side))
    moved = _moved(side.name, dialect)
    layout = " ".join([*(f"{axis}/each" for axis in moved), side.layout.text])
    return (Side(_without(side.name, moved), parse(layout)),)


def _moved(name: str, dialect: str) -> list[str]:
    return [axis for axis in _MOVED[dialect] if f"{{{axis}}}." in name]


def _without(name: str, axes: Iterable[str]) -> str:
    for axis in axes:
        name = name.replace(f"{{{axis}}}.", "", 1)
    return name


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
    numbered = [key for key in names if re.match(rf"{_DECODER}\d+\.", key)]
    stacked = [key for key in names if re.match(rf"{_DECODER}[a-z]", key)]
    if bool(numbered) == bool(stacked):
        found = f"{len(numbered)} keys with a layer number, {len(stacked)} without"
        raise refuse("dialect", f"the key dialect is not recognisable: {found}")
    if stacked:
        return "stacked"
    return "singleton" if any(_SINGLE.search(key) for key in numbered) else "per-layer"


def extra_state_keys(module: str, dialect: str, layers: Sequence[int], sizes: Mapping[str, int]) -> Iterator[str]:
    """Keys of the objects that a Transformer Engine model asks for, for one module, in a dialect.

    module: as in `Side.name`, with `{l}` and `{e}`. layers: those that have the module.
    """
    moved = _moved(module, dialect)
    names = re.findall(r"\{(\w+)\}", module)
    shape = ".".join(str(sizes[axis]) for axis in moved) or "1"
    for values in combinations(*(layers if axis == "l" else range(sizes[axis]) for axis in names)):
        index = dict(zip(names, values, strict=True))
        place = ".".join(str(index[axis]) for axis in moved) or "0"
        yield f"{_without(module, moved).format(**index)}._extra_state/shard_{place}_{shape}"
