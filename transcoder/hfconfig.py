"""config.json → plain values for recipes: both Hugging Face dialects folded into one, nothing executed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import Problem, reason, refuse
from transcoder.paths import read_small

CONFIG_LIMIT = 16 << 20  # bytes
NESTING_LIMIT = 64
_NO_BRACKETS = bytes(byte for byte in range(256) if byte not in b"{[]}")


def read_json(path: Path, limit: int) -> Any:
    """A JSON file, strictly: UTF-8, at most `limit` bytes, no repeated keys, no NaN. Raises InputError."""
    return raw_json(path, limit)[1]


def raw_json(path: Path, limit: int) -> tuple[bytes, Any]:
    """The bytes of a JSON file and what they say, strictly, as `read_json`."""
    try:
        data = read_small(path, limit)
        return data, parse_json(data)
    except (OSError, ValueError, RecursionError) as error:
        raise refuse("json", "cannot read a JSON file", [Problem(file=path.name, message=reason(error))]) from error


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, bounded nesting, no repeated keys, no NaN or Infinity. Raises ValueError."""
    depth = 0
    for byte in data.translate(None, _NO_BRACKETS):
        depth += 1 if byte in b"{[" else -1
        if depth > NESTING_LIMIT:
            raise ValueError(f"nested deeper than {NESTING_LIMIT}")
    found = json.loads(data.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant, parse_int=_integer)
    if b"\\ud" in data.lower():  # half of a surrogate pair is not Unicode: UnicodeEncodeError is a ValueError
        json.dumps(found, ensure_ascii=False).encode()
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = Counter(name for name, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"the key {twice!r:.120} occurs twice")
    return found


def _integer(text: str) -> float:
    """An integer; minus zero is a number, but none of a size or an offset."""
    return int(text) if text != "-0" else -0.0


def _no_constant(text: str) -> Any:
    raise ValueError(f"{text} is not JSON")


def read_config(directory: Path) -> dict[str, Any]:
    """config.json of a Hugging Face directory. Raises InputError when it is absent or not an object."""
    path = directory / "config.json"
    if not there(path):
        problem = Problem(
            file="config.json", expected="a Hugging Face directory with config.json", found="no such file"
        )
        raise refuse("no-config", f"{directory} is not a Hugging Face model directory", [problem])
    config = read_json(path, CONFIG_LIMIT)
    if not isinstance(config, dict):
        raise refuse("config", "config.json is not a JSON object", [Problem(file="config.json")])
    return config


def architecture_of(config: Mapping[str, Any]) -> str:
    """The one class name under `architectures`, or an empty string."""
    names = config.get("architectures")
    return names[0] if isinstance(names, list) and len(names) == 1 and isinstance(names[0], str) else ""


def normalise(config: Mapping[str, Any], defaults: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Config values with one spelling: `rope_theta`, `rope_type` and `dtype`, whichever release wrote the file.

    defaults: of fields that the config may leave out, as the architecture's class has them.
    """
    values = dict(config)
    if isinstance(config.get("text_config"), dict):  # of a model with more than text; ties are declared at the top
        values |= {key: value for key, value in config["text_config"].items() if key not in _TOP}
    if isinstance(config.get("vision_config"), dict):
        values |= {f"vision_{key}": value for key, value in config["vision_config"].items()}
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if isinstance(rope, dict):
        values |= {f"rope_{key.removeprefix('rope_')}": value for key, value in _flat(rope) if key != "rope_theta"}
        values["rope_theta"] = values.get("rope_theta") or rope.get("rope_theta")
        values["rope_type"] = rope.get("rope_type") or rope.get("type")
        values["mrope_section"] = rope.get("mrope_section")
    values["dtype"] = values.get("dtype") or values.get("torch_dtype")
    _check_types(values)
    for name, value in {"tie_word_embeddings": False, **(defaults or {})}.items():
        values[name] = value if values.get(name) is None else values[name]
    return values


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """The fields of a table; those of a table inside under both names, as `full_attention_rope_theta`."""
    for key, value in table.items():
        if isinstance(value, dict):
            yield from ((f"{key}_{name}", inner) for name, inner in value.items())
        else:
            yield key, value


_TOP = ("tie_word_embeddings", "architectures", "model_type", "dtype", "torch_dtype")
NUMBERS = {"rope_theta": 1e18, "rms_norm_eps": 1.0, "max_position_embeddings": 1 << 40}  # positive, at most this


def _check_types(values: Mapping[str, Any]) -> None:
    problems = [
        Problem(file="config.json", message=f"{name} = {values[name]!r:.80}", expected=f"a number, at most {limit:g}")
        for name, limit in NUMBERS.items()
        if values.get(name) is not None and not _is_number(values[name], limit)
    ]
    if values.get("head_dim") is not None and not (type(values["head_dim"]) is int and values["head_dim"] > 0):
        message = f"head_dim = {values['head_dim']!r:.80}"
        problems.append(Problem(file="config.json", message=message, expected="a positive integer"))
    for name in ("dtype", "rope_type"):
        if not isinstance(values.get(name), str | None):
            problems.append(Problem(file="config.json", message=f"{name} = {values[name]!r:.80}", expected="a text"))
    if problems:
        raise refuse("config", "the config does not describe a model", problems)


def _is_number(value: Any, limit: float) -> bool:
    return type(value) in (int, float) and 0 < value <= limit
