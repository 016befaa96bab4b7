"""The page of `inspect --html`: one file that holds all it shows and asks nothing of a network.

Names reach the page as JSON in a block that no name can end, and its script makes text of them, never markup.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import Any

from transcoder.errors import OutputError, printable
from transcoder.outline import NAME_LIMIT, Held, Node, natural
from transcoder.spec import Box


def write_page(path: Path, report: Mapping[str, Any], root: Node) -> None:
    """Write the page of a report on a checkpoint. Raises OutputError."""
    try:
        path.write_text(page(report, root), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", kind="html") from error


def page(report: Mapping[str, Any], root: Node) -> str:
    """The whole file."""
    files = {name: number for number, name in enumerate(sorted(_names(root), key=natural))}
    tree = _node(root, files)
    sizes = {row["name"]: row["bytes"] for row in report["files"]}
    facts = {name: _plain(report.get(name)) for name in ("source", "format", "architecture", "dialect", "parallel")}
    data = facts | {
        "tensors": report["tensors"],
        "parameters": report["parameters"],
        "warnings": [_plain(text) for text in report["warnings"]],
        "config": {_plain(name): _plain(value) for name, value in report["config"].items()},
        "files": [[_plain(name), sizes.get(name)] for name in files],
        "unread": [[_plain(name), size] for name, size in sizes.items() if name not in files],
        "tree": tree,
    }
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    script = text.split("<script>", 1)[1].split("</script>", 1)[0]
    allowed = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return text.replace("SCRIPT-DIGEST", allowed, 1).replace("CHECKPOINT-DATA", _embedded(data), 1)


def _embedded(data: Any) -> str:
    """JSON in ASCII that holds neither the end of a block nor the start of a comment."""
    text = json.dumps(data, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _plain(value: Any) -> Any:
    """Texts without characters that hide what they are."""
    if isinstance(value, Mapping):
        return {_plain(name): _plain(item) for name, item in value.items()}
    return printable(value, NAME_LIMIT) if isinstance(value, str) else value


def _node(node: Node, files: dict[str, int]) -> dict[str, Any]:
    """A node as the page reads it: n name, i numbers, b below, t the tensor that ends here, p its chunks' places."""
    found: dict[str, Any] = {"n": node.name}
    if node.numbers:
        found["i"] = node.numbers
    if node.below:
        found["b"] = [_node(inner, files) for inner in node.below]
    if node.held:
        first = node.held[0]
        found["t"] = [first.dtype.name, first.dtype.size, list(first.shape), *_grid(first)]
        found["p"] = [[part for _, file, at in held.places for part in (files[file], at)] for held in node.held]
    return found


def _names(node: Node) -> set[str]:
    """The files that hold what is here and below."""
    return {file for held in node.held for _, file, _ in held.places}.union(*map(_names, node.below))


def _grid(held: Held) -> tuple[list[list[int]], list[Box] | None]:
    """Where the chunks begin in each dimension, the end last; and the boxes, where they are no grid in that order."""
    boxes = [box for box, _, _ in held.places]
    starts = [sorted({box[dim][0] for box in boxes}) for dim in range(len(held.shape))]
    edges = [[*found, size] for found, size in zip(starts, held.shape, strict=True)]
    even = prod(len(dim) - 1 for dim in edges) == len(boxes) and boxes == _boxes(edges)
    return edges, None if even else boxes


def _boxes(edges: list[list[int]]) -> list[Box]:
    found: list[Box] = [()]
    for dim in edges:
        found = [(*box, interval) for box in found for interval in pairwise(dim)]
    return found
