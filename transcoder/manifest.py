"""transcode-manifest.json: what lets an export give back the original files, and a check find any damage."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import xxhash

from transcoder.disk import there
from transcoder.errors import Problem, reason, refuse
from transcoder.hfconfig import parse_json
from transcoder.manifestcheck import NAME as NAME
from transcoder.manifestcheck import check_table
from transcoder.paths import open_regular, read_small

LIMIT = 1 << 30  # bytes
HEADER_LIMIT = 256 << 20


def emit(table: Mapping[str, Any]) -> memoryview:
    """The manifest's bytes, its own digest included: sorted keys, one tensor or file per line, no times.

    Lists may be given as iterators: a line is made when it is its turn.
    """
    text, place = bytearray(b"{\n"), 0
    for number, key in enumerate(sorted({*table, "self"})):
        text += (b",\n" if number else b"") + f"{json.dumps(key)}: ".encode()
        place = len(text) + 1 if key == "self" else place
        for part in _texts("" if key == "self" else table[key]):
            text += part.encode()
    text += b"\n}\n"
    text[place:place] = f"xxh3-128:{xxhash.xxh3_128(text).hexdigest()}".encode()
    return memoryview(text)


def _texts(value: Any) -> Iterator[str]:
    if not isinstance(value, list | Iterator):
        yield _compact(value)
        return
    yield "[\n"
    for number, row in enumerate(value):
        yield f",\n  {_compact(row)}" if number else f"  {_compact(row)}"
    yield "\n]"


def _compact(value: Any) -> str:
    return json.dumps(value, sort_keys=True, ensure_ascii=False)


def read(folder: Path) -> dict[str, Any] | None:
    """The manifest of an iteration folder, or None. Raises InputError when it is damaged or of an unknown version."""
    path = folder / NAME
    if not there(path):
        return None
    try:
        data = read_small(path, LIMIT)
        table: Any = parse_json(data)
    except (OSError, ValueError, RecursionError) as error:
        raise refuse("manifest", "the manifest cannot be read", [Problem(file=NAME, message=reason(error))]) from error
    known = isinstance(table, dict) and table.get("format") == "transcode-manifest"
    if not known or type(table.get("version")) is not int or table["version"] != 1:
        raise refuse("manifest", "the manifest is of an unknown version", [Problem(file=NAME)])
    if data != emit({key: value for key, value in table.items() if key != "self"}):
        raise refuse("manifest", "the manifest does not have its own digest: it is damaged", [Problem(file=NAME)])
    check_table(table)
    return dict(table)


def pack(data: bytes) -> str:
    """Bytes as text for the manifest."""
    return base64.b64encode(zlib.compress(data, 6)).decode()


def unpack(text: str) -> bytes:
    """The bytes that `pack` took, at most 256 MiB. Raises InputError."""
    try:
        unpacker = zlib.decompressobj()
        data = unpacker.decompress(base64.b64decode(text, validate=True), HEADER_LIMIT)
    except (ValueError, zlib.error) as error:
        raise refuse("manifest", "a packed field of the manifest is damaged", [Problem(file=NAME)]) from error
    if not unpacker.eof:
        raise refuse("manifest", "a packed field of the manifest is too large", [Problem(file=NAME)])
    return data


def file_digest(data: bytes | memoryview) -> str:
    """The digest of a small file."""
    return f"xxh3-128:{xxhash.xxh3_128(data).hexdigest()}"


def _digest_of(path: Path, root: Path) -> str:
    """The digest of a file that may be large. Raises OSError, ValueError."""
    state = xxhash.xxh3_128()
    with open_regular(path, root=root) as file:
        while data := file.read(1 << 20):
            state.update(data)
    return f"xxh3-128:{state.hexdigest()}"


def changed_files(folder: Path, rows: Iterable[Mapping[str, Any]]) -> Iterator[Problem]:
    """Files of the manifest that are absent, of another size or, payload files apart, of another digest."""
    for row in rows:
        path, size = folder / row["name"], row["size"]
        root = folder.parent if row["name"].startswith("../") else folder
        try:
            if not path.is_file():
                found, hint = "no such file", "copy it again"
            elif path.stat().st_size != size:
                found, hint = f"{path.stat().st_size} bytes", "the file was changed, or not copied in full"
            elif row["digest"].startswith("xxh3") and (digest := _digest_of(path, root)) != row["digest"]:
                found, hint = digest, "the file was changed"
            else:
                continue
        except (OSError, ValueError) as error:
            found, hint = reason(error), "copy the file itself"
        expected = f"{size} bytes, {row['digest']}"
        yield Problem(file=row["name"], expected=expected, found=found, hint=hint)
