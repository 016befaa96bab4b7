"""What a manifest may say: every field that is used, checked once, before anything is looked up by it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from transcoder.errors import Problem, refuse
from transcoder.paths import plain_name
from transcoder.spec import BY_SAFETENSORS, DTYPES

NAME = "transcode-manifest.json"
TRACKER_NAMES = ("../latest_checkpointed_iteration.txt", "../latest_train_state.pt")
SIZE_LIMIT = 1 << 62
VOCABULARY_LIMIT = 1 << 32
_DIGEST = re.compile(r"(xxh3-128|crc32|sha256|blake3)(/\d+MiB)?:([0-9a-f]{8}|[0-9a-f]{32}|[0-9a-f]{64})")


def check_table(table: Mapping[str, Any]) -> None:
    """Refuse a manifest whose fields are not what they must be; unknown fields are nobody's business."""
    problems = [Problem(file=NAME, message=message) for message in _problems(table)]
    if problems:
        raise refuse("manifest", "the manifest does not describe a checkpoint", problems)


def _problems(table: Mapping[str, Any]) -> Iterator[str]:
    texts = {name: table.get(name) for name in ("recipe", "layout", "direction", "folder")}
    yield from (f"{name}: {_show(value)} is not a name" for name, value in texts.items() if not plain_name(value))
    source, restore = table.get("source"), table.get("restore")
    if not isinstance(source, dict) or not isinstance(restore, dict) or not isinstance(table.get("variants"), dict):
        yield "source, restore or variants is not a table"
        return
    yield from _rows(
        table.get("files"), "files", lambda row: _is_path(row["name"]) and _is_size(row) and _is_digest(row)
    )
    yield from _rows(source.get("files"), "source.files", lambda row: plain_name(row["name"]) and _is_size(row))
    yield from _rows(table.get("tensors"), "tensors", _is_tensor)
    yield from _restore(restore, source)


def _show(value: object) -> str:
    return f"{value!r:.80}"


def _rows(rows: object, what: str, is_right: Callable[[Any], bool]) -> Iterator[str]:
    """What is wrong with a list of tables that have distinct names."""
    if not isinstance(rows, list):
        yield f"{what} is not a list"
        return
    seen = set[str]()
    for row in rows:
        name = row.get("name") if isinstance(row, dict) else None
        if not isinstance(name, str) or name in seen or not is_right(row):
            yield f"{what}: {_show(name)} is repeated, or not described as it must be"
        else:
            seen.add(name)


def _is_path(name: str) -> bool:
    return name in TRACKER_NAMES or all(part not in ("", ".", "..") and "\0" not in part for part in name.split("/"))


def _is_size(row: Mapping[str, Any]) -> bool:
    return type(row.get("size")) is int and 0 <= row["size"] < SIZE_LIMIT


def _is_digest(row: Mapping[str, Any]) -> bool:
    return isinstance(row.get("digest"), str) and _DIGEST.fullmatch(row["digest"]) is not None


def _is_tensor(row: Mapping[str, Any]) -> bool:
    shape, tree = row.get("shape"), row.get("tree")
    sizes = isinstance(shape, list) and all(type(size) is int and 0 <= size < SIZE_LIMIT for size in shape)
    known = isinstance(row.get("dtype"), str) and row["dtype"] in BY_SAFETENSORS and type(row.get("exact")) is bool
    return sizes and known and isinstance(tree, str) and _DIGEST.fullmatch(tree) is not None


def _restore(restore: Mapping[str, Any], source: Mapping[str, Any]) -> Iterator[str]:
    headers, vocabulary = restore.get("headers"), restore.get("vocab_size")
    rows = source["files"] if isinstance(source.get("files"), list) else []
    names = {row["name"] for row in rows if isinstance(row, dict) and isinstance(row.get("name"), str)}
    if not isinstance(headers, dict) or not all(isinstance(text, str) for text in headers.values()):
        yield "restore.headers is not a table of texts"
    elif headers.keys() != names:
        odd = sorted(headers.keys() ^ names)[:3]
        yield f"restore.headers and source.files name other shards: {_show(odd)}"
    if not isinstance(restore.get("index"), str):
        yield "restore.index is not a text"
    if type(vocabulary) is not int or not 0 < vocabulary <= VOCABULARY_LIMIT:
        yield f"restore.vocab_size is {_show(vocabulary)}"
    if not isinstance(restore.get("dtype"), str) or restore["dtype"] not in DTYPES:
        yield f"restore.dtype is {_show(restore.get('dtype'))}"
