"""Edits of JSON that keep it readable: one node dropped, doubled, moved, renamed or made extreme."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

NUMBERS = (
    "0 -0 -1 1 2 3 7 8 64 255 65536 2147483648 4294967296 4611686018427387904 9223372036854775807 9223372036854775808 "
    "18446744073709551616 1e999 -1e999 1.0 0.5 1e-320 NaN Infinity " + "9" * 400 + " " + "1" * 5000
).split()
TEXTS = (
    "",
    ".",
    "..",
    "../x",
    "/etc/passwd",
    "a\\b",
    "C:x",
    "\0",
    "\x1b[31m",
    "\ud800",
    "é",
    "x" * 300,
    "é" * 200,
    "bfloat16",
    "BF16",
    "model.safetensors",
)


@dataclass(frozen=True)
class Raw:
    """A JSON value by its text, which need not be legal."""

    text: str


Table = list[tuple[str, Any]]  # an object; lists are `Items`


class Items(list[Any]):
    """A JSON array, told from an object."""


def parse(data: bytes) -> Any:
    """The value, objects as lists of pairs. Raises ValueError."""
    return _marked(json.loads(data.decode("utf-8", "surrogatepass"), object_pairs_hook=_Object))


class _Object(list[tuple[str, Any]]):
    pass


def _marked(value: Any) -> Any:
    if isinstance(value, _Object):
        return [(key, _marked(item)) for key, item in value]
    return Items(_marked(item) for item in value) if isinstance(value, list) else value


def dump(value: Any) -> str:
    """The text of what `parse` gave, escapes as they come, no spaces.

    >>> dump([("a", Items([1, Raw("NaN")])), ("a", None)])
    '{"a":[1,NaN],"a":null}'
    """
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, Items):
        return "[" + ",".join(map(dump, value)) + "]"
    if isinstance(value, list):
        return "{" + ",".join(f"{json.dumps(key)}:{dump(item)}" for key, item in value) + "}"
    return json.dumps(value)


def mutate(rng: Random, data: bytes, words: Sequence[str] = ()) -> bytes:
    """One to three edits. Raises ValueError for what is not JSON."""
    value = parse(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        value = edited(rng, value, words)
    return dump(value).encode("utf-8", "surrogatepass")


def edited(rng: Random, value: Any, words: Sequence[str]) -> Any:
    """The value with one node changed."""
    places = list(_places(value))
    if not places:
        return extreme(rng, words)
    parent, at = rng.choice(places)
    rng.choice(EDITS)(rng, parent, at, words)
    return value


def _places(value: Any) -> Any:
    if isinstance(value, list):
        for at, item in enumerate(value):
            yield value, at
            yield from _places(item if isinstance(value, Items) else item[1])


def shrunk(data: bytes, bad: Callable[[bytes], bool]) -> bytes:
    """A smaller input that is still `bad`, by dropping nodes, the outermost first; the same where it is not JSON.

    >>> shrunk(b'{"a": [1, 2, {"b": 3}], "c": 4}', lambda data: b"2" in data)
    b'{"a":[2]}'
    """
    at = 0
    while (less := _without(data, at)) is not None:
        data, at = (less, at) if bad(less) else (data, at + 1)
    return data


def _without(data: bytes, number: int) -> bytes | None:
    try:
        value = parse(data)
    except (ValueError, RecursionError):
        return None
    for count, (parent, at) in enumerate(_places(value)):
        if count == number:
            del parent[at]
            return dump(value).encode("utf-8", "surrogatepass")
    return None


def extreme(rng: Random, words: Sequence[str]) -> Any:
    """A value that readers dislike."""
    kind = rng.randrange(6)
    if kind == 0:
        return rng.choice((None, True, False, Items(), [], Items([Items()]), [("a", 1)]))
    if kind == 1:
        return Raw("[" * 70 + "]" * 70) if rng.random() < 0.2 else rng.randrange(-3, 70)
    if kind == 2 and words:
        return rng.choice(words)
    return rng.choice(TEXTS) if kind == 3 else Raw(rng.choice(NUMBERS))


def _put(parent: Any, at: int, value: Any) -> None:
    parent[at] = value if isinstance(parent, Items) else (parent[at][0], value)


def _replace(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    _put(parent, at, extreme(rng, words))


def _drop(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    del parent[at]


def _double(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    parent.insert(rng.randrange(len(parent) + 1), parent[at])


def _swap(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    other = rng.randrange(len(parent))
    parent[at], parent[other] = parent[other], parent[at]


def _rename(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    if not isinstance(parent, Items):
        name = rng.choice(words) if words and rng.random() < 0.7 else rng.choice(TEXTS)
        parent[at] = name, parent[at][1]


def _add(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    value = extreme(rng, words)
    parent.insert(at, value if isinstance(parent, Items) else (rng.choice(words or TEXTS), value))


def _nudge(rng: Random, parent: Any, at: int, words: Sequence[str]) -> None:
    value = parent[at] if isinstance(parent, Items) else parent[at][1]
    if type(value) is int:
        _put(parent, at, value + rng.choice((-8, -2, -1, 1, 2, 8)))
    else:
        _put(parent, at, Items([value]))


EDITS: tuple[Callable[[Random, Any, int, Sequence[str]], None], ...] = (
    _replace, _replace, _replace, _drop, _double, _swap, _rename, _add, _nudge,
)  # fmt: skip
