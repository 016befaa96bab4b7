"""Readers written from the format documents alone, slowly and plainly; None is a refusal."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import combinations
from math import prod
from typing import Any

import xxhash

SIZES = dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1) | dict.fromkeys(("I16", "F16", "BF16"), 2)
SIZES |= dict.fromkeys(("I32", "F32"), 4) | dict.fromkeys(("I64", "F64"), 8)
LIMIT = 1 << 62


class _RefusedError(Exception):
    pass


def _need(condition: object) -> None:
    if not condition:
        raise _RefusedError


def _or_none(read: Callable[[], Any]) -> Any:
    try:
        return read()
    except (_RefusedError, ValueError, RecursionError):
        return None


def strict_json(data: bytes) -> Any:
    """JSON as these formats demand it: Unicode in UTF-8, no repeated keys, no NaN, at most 64 levels."""
    text = data.decode("utf-8")
    found = json.loads(text, object_pairs_hook=_object, parse_constant=lambda name: _need(False))
    _need(_depth(found) <= 64 and _unicode(found))
    return found


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _need(len({key for key, _ in pairs}) == len(pairs))
    return dict(pairs)


def _depth(value: Any) -> int:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
    return 0 if inner is None else 1 + max(map(_depth, inner), default=0)


def _unicode(value: Any) -> bool:
    """Whether no text in it holds half of a surrogate pair, which is not Unicode."""
    return not any(0xD800 <= ord(c) < 0xE000 for c in json.dumps(value, ensure_ascii=False))


def safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]] | None:
    """Tensors by name: dtype, shape, bytes; after the README of safetensors and section 1.1 of the threat model."""
    return _or_none(lambda: _safetensors(data))


def _safetensors(data: bytes) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    _need(len(data) >= 8)
    length = int.from_bytes(data[:8], "little")
    _need(length <= 100_000_000 and 8 + length <= len(data) and data[8:9] == b"{")
    table = strict_json(data[8 : 8 + length])
    _need(b"-" not in _outside_texts(data[8 : 8 + length]))
    notes = table.pop("__metadata__", {})
    _need(type(notes) is dict and all(type(note) is str for note in notes.values()))
    payload = data[8 + length :]
    found = {name: _tensor(entry, payload) for name, entry in table.items()}
    used = sorted(tuple(entry["data_offsets"]) for entry in table.values())
    _need([0, *(end for _, end in used)] == [*(start for start, _ in used), len(payload)])
    return found


def _outside_texts(header: bytes) -> bytes:
    """A header without its string literals: what is left is structure and numbers, none of them negative."""
    out, inside, at = b"", False, 0
    while at < len(header):
        if inside and header[at : at + 1] == b"\\":
            at += 1
        elif header[at : at + 1] == b'"':
            inside = not inside
        elif not inside:
            out += header[at : at + 1]
        at += 1
    return out


def _tensor(entry: Any, payload: bytes) -> tuple[str, tuple[int, ...], bytes]:
    _need(type(entry) is dict and entry.keys() == {"dtype", "shape", "data_offsets"})
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    _need(type(dtype) is str and dtype in SIZES)
    _need(type(shape) is list and len(shape) <= 16 and all(type(n) is int and 0 <= n < LIMIT for n in shape))
    _need(type(offsets) is list and len(offsets) == 2 and all(type(n) is int for n in offsets))
    _need(0 <= offsets[0] <= offsets[1] <= len(payload))
    _need(_count(shape) * SIZES[dtype] == offsets[1] - offsets[0])
    return dtype, tuple(shape), payload[offsets[0] : offsets[1]]


def _count(shape: list[int]) -> int:
    """The number of elements; extents whose product passes 63 bits are refused, even beside a zero."""
    _need(prod(size or 1 for size in shape) < 1 << 63)
    return prod(shape)


def index(data: bytes) -> dict[str, str] | None:
    """The weight map of an index, every value a plain file name."""
    return _or_none(lambda: _index(data))


def _index(data: bytes) -> dict[str, str]:
    table = strict_json(data)
    weights = table.get("weight_map") if type(table) is dict else None
    _need(type(weights) is dict and weights)
    for file in weights.values():
        _need(type(file) is str and 0 < len(file) < 256 and file not in (".", ".."))
        _need(not any(c in file for c in "/\\:\0"))
    return dict(weights)


def sealed(data: bytes) -> bool:
    """Whether a manifest holds the digest of itself with that field empty."""
    start = data.rfind(b'"self": "') + len(b'"self": "')
    end = data.find(b'"', start)
    rest = data[:start] + data[end:]
    return data[start:end] == f"xxh3-128:{xxhash.xxh3_128(rest).hexdigest()}".encode()


# A plan: key → (dtype, shape, boxes as (offsets, sizes)); and rows of key, offsets, file, offset, length in bytes.
Box = tuple[list[int], list[int]]
Place = tuple[str, int, int]
Plan = tuple[dict[str, tuple[str, list[int], list[Box]]], list[list[Any]]]


def plan(described: Plan) -> dict[str, Any] | None:
    """Tensors by key: dtype, shape, boxes with their places; None when the plan lies."""
    return _or_none(lambda: _plan(*described))


def _plan(tensors: dict[str, tuple[str, list[int], list[Box]]], rows: list[list[Any]]) -> dict[str, Any]:
    found = {(key, tuple(at)): tuple(place) for key, at, *place in rows}
    _need(len(found) == len(rows) and _apart([*found.values()]))
    _need(all(map(_confined, found.values())) and all(_sane(at) for _, at in found))
    for key, (_, shape, boxes) in tensors.items():
        _need(_sane([*shape, *(n for box in boxes for part in box for n in part)]) and _tiles(shape, boxes))
        _need(all((key, tuple(at)) in found for at, _ in boxes))
    return {
        key: (dtype, tuple(shape), tuple((tuple(at), tuple(n), found[key, tuple(at)]) for at, n in boxes))
        for key, (dtype, shape, boxes) in tensors.items()
    }


def _sane(numbers: Any) -> bool:
    """Integers that are no less than nothing and leave room for sums."""
    return all(type(n) is int and 0 <= n < LIMIT for n in numbers)


def _confined(place: Place) -> bool:
    """A path that stays in its folder on every system, and a sane range."""
    parts = place[0].split("/")
    return _sane(place[1:]) and all(p not in ("", ".", "..") and not set(p) & set("\\\0") for p in parts)


def _apart(places: list[Place]) -> bool:
    """Whether no two ranges of a file meet."""
    return not any(f == g and max(a, b) < min(a + m, b + n) for (f, a, m), (g, b, n) in combinations(places, 2))


def _tiles(shape: list[int], boxes: list[Box]) -> bool:
    """Whether boxes hold every element of a shape once: inside, disjoint, of its volume together."""
    if not all(len(at) == len(n) == len(shape) for at, n in boxes):
        return False
    inside = all(a + n <= size for box in boxes for a, n, size in zip(*box, shape, strict=True))
    volume = sum(prod(n) for _, n in boxes)
    return inside and volume == prod(shape) and not any(_meet(one, two) for one, two in combinations(boxes, 2))


def _meet(one: Box, two: Box) -> bool:
    return all(max(a, b) < min(a + m, b + n) for a, m, b, n in zip(*one, *two, strict=True))
