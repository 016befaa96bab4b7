"""config.json of an export: the original's bytes, changed where the exported weights differ from the original's."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transcoder.hfconfig import parse_json
from transcoder.megatron import Megatron
from transcoder.recipe import evaluate
from transcoder.spec import DType


def config_changes(source: Megatron, config: Mapping[str, Any], dtype: DType) -> dict[str, Any]:
    """Fields of config.json to set, or to remove where the value is None, for weights that are not the original's.

    dtype: that of the exported weights.
    """
    changes: dict[str, Any] = {"quantization_config": None, "torch_dtype": dtype.name, "dtype": dtype.name}
    values = dict(source.model.values)
    for guard, fields in source.model.recipe.outgoing.items():
        if evaluate(guard, values) and not evaluate(guard, values | source.originally):
            changes |= fields
    return {name: value for name, value in changes.items() if _found(config, name) not in (value, _ABSENT)}


_ABSENT = object()


def _found(config: Mapping[str, Any], name: str) -> Any:
    inner = config.get("text_config")
    table = inner if isinstance(inner, dict) and name in inner else config
    return table.get(name, _ABSENT)


def changed(data: bytes, changes: Mapping[str, Any]) -> bytes:
    """config.json with other values for some of its fields; the same bytes without any."""
    if not changes:
        return data
    config = parse_json(data)
    for table in (config, config.get("text_config")):
        for name, value in changes.items() if isinstance(table, dict) else ():
            if name in table and value is None:
                del table[name]
            elif name in table:
                table[name] = value
    return emitted(config)


def emitted(config: Mapping[str, Any]) -> bytes:
    """The bytes of a config.json."""
    return (json.dumps(config, indent=2, ensure_ascii=False) + "\n").encode()
