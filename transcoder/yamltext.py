"""YAML as plain data: no tags that make objects, no aliases that multiply, no repeated keys, bounded depth."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transcoder.errors import Problem, reason, refuse
from transcoder.paths import read_small

LIMIT = 16 << 20  # bytes
NODES = 100_000  # nodes once every alias is written out
DEPTH = 64
# PyYAML lets through whatever its readers of numbers, times and truth values raise.
_RAISED = OSError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError, RecursionError


def read_yaml(path: Path) -> Any:
    """The one document of a file. Raises InputError."""
    import yaml

    try:
        return _document(read_small(path, LIMIT).decode("utf-8"))
    except (*_RAISED, yaml.YAMLError) as error:
        problem = Problem(file=path.name, message=reason(error).replace("\n", " "))
        raise refuse("config", "cannot read a YAML file", [problem]) from error


def _document(text: str) -> Any:
    import yaml

    if max(map(_indent, text.split("\n"))) > 4096 or _brackets(text) > 4 * DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 1)
        return loader.construct_document(node)
    finally:
        loader.dispose()


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def _brackets(text: str) -> int:
    """The deepest that brackets could nest; those in texts count, too."""
    depth = deepest = 0
    for char in text:
        if char in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif char in "]}" and depth:
            depth -= 1
    return deepest


def _count(node: Any, known: dict[int, int], depth: int) -> int:
    """Nodes below and with `node` once aliases are written out; 0 in `known` marks a node that is being counted."""
    if depth > DEPTH:
        raise ValueError(f"nested deeper than {DEPTH}")
    if id(node) in known:
        if not known[id(node)]:
            raise ValueError("an alias leads to what it is part of")
        return known[id(node)]
    known[id(node)] = 0
    total = 1 + sum(_count(child, known, depth + 1) for child in _children(node))
    if total > NODES:
        raise ValueError(f"more than {NODES} nodes once aliases are written out")
    known[id(node)] = total
    return total


def _children(node: Any) -> Iterator[Any]:
    """What a node holds. Raises ValueError when a mapping has a key twice."""
    if isinstance(node.value, str):
        return
    seen = set[str]()
    for entry in node.value:
        if not isinstance(entry, tuple):
            yield entry
            continue
        key = entry[0]
        if isinstance(key.value, str) and key.value in seen and key.value != "<<":
            raise ValueError(f"the key {key.value!r:.120} occurs twice")
        seen |= {key.value} if isinstance(key.value, str) else set()
        yield from entry
