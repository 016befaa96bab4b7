"""Independent readings of what our readers accepted: other software, or a few lines after the format's document."""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from itertools import pairwise
from typing import Any, ClassVar
from zlib import crc32

from transcoder.formats.pickles import Global, Pairs, Persistent, Record
from transcoder.formats.safetensors import Shard
from transcoder.formats.store import Store


class DisagreementError(AssertionError):
    """We accept what another reader refuses or reads as something else."""


def agree(what: str, ours: object, theirs: object) -> None:
    """Raise DisagreementError unless both are written alike, which NaN is, too."""
    if repr(ours) != repr(theirs):
        raise DisagreementError(f"{what}: we read {ours!r:.300}, another reader {theirs!r:.300}")


def safetensors(data: bytes, shard: Shard) -> None:
    """The official library accepts the file and finds the same tensors with the same bytes."""
    from safetensors import deserialize

    try:
        theirs = {name: (row["dtype"], list(row["shape"]), bytes(row["data"])) for name, row in deserialize(data)}
    except Exception as error:
        raise DisagreementError(f"safetensors refuses what we accept: {error}") from error
    ours = {t.name: (t.dtype.safetensors, list(t.shape), _bytes(data, t.chunks[0])) for t in shard.tensors}
    agree("tensors", sorted(ours.items()), sorted(theirs.items()))


def _bytes(data: bytes, chunk: Any) -> bytes:
    return data[chunk.offset : chunk.offset + chunk.nbytes]


def index(data: bytes, weights: dict[str, str]) -> None:
    """Python's own JSON reader finds the same map, all of it plain file names."""
    agree("weight_map", weights, json.loads(data)["weight_map"])
    if any("/" in name or "\\" in name or "\0" in name or name in ("", ".", "..") for name in weights.values()):
        raise DisagreementError("a name of the index is a path")


def archive(data: bytes, found: dict[str, tuple[int, int]]) -> None:
    """The standard library finds the same records (name → start, size), and contents where checksums are right."""
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as other:
            rows = {row.filename.partition("/")[2]: row for row in other.infolist()}
            agree("records", sorted(found), sorted(rows))
            for name, (start, size) in found.items():
                ours = data[start : start + size]
                if crc32(ours) == rows[name].CRC:
                    agree(name, ours, other.read(rows[name]))
    except NotImplementedError:
        return  # a version number from the future: nothing that we read depends on it
    except (zipfile.BadZipFile, struct.error, EOFError, OverflowError) as error:
        raise DisagreementError(f"zipfile refuses what we accept: {error}") from error


def pickled(data: bytes, ours: object) -> None:
    """CPython's own unpickler, its objects made inert, builds the same value."""
    try:
        theirs = _Inert(io.BytesIO(data)).load()
    except Exception as error:
        raise DisagreementError(f"CPython refuses a pickle that we accept: {error!r}") from error
    agree("pickle", _plain(ours), _plain(theirs))


class _Dict(list[tuple[object, object]]):
    """A dict that hashes nothing."""

    def __setitem__(self, key: Any, value: Any) -> None:
        self.append((key, value))


class _Name:
    """A global that makes inert objects when called."""

    def __init__(self, module: str, name: str) -> None:
        self.text = (module, name)
        self.__new__ = lambda cls, *args: _Made(cls.text, args)  # type: ignore[method-assign,assignment]

    def __call__(self, *args: Any) -> Any:
        if self.text == ("torch", "Size"):
            return args[0]
        return args[0].encode(args[1]) if self.text == ("_codecs", "encode") else _Made(self.text, args)


class _Made:
    """An inert object."""

    def __init__(self, text: tuple[str, str], args: tuple[Any, ...]) -> None:
        self.text, self.args, self.state, self.items = text, args, None, None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items = self.items or []
        self.items.append((key, value))


class _Ref:
    """A persistent reference."""

    def __init__(self, value: Any) -> None:
        self.value = value


class _Inert(pickle._Unpickler):  # type: ignore[name-defined,misc]
    """The reference implementation in Python; frames count as lengths only, as in the C one."""

    dispatch: ClassVar[Any] = dict(pickle._Unpickler.dispatch)  # type: ignore[attr-defined]

    def find_class(self, module: str, name: str) -> Any:
        return _Name(module, name)

    def persistent_load(self, value: Any) -> Any:
        return _Ref(value)

    def load_empty_dictionary(self) -> None:
        self.append(_Dict())

    def load_frame(self) -> None:
        self.read(8)

    dispatch[pickle.EMPTY_DICT[0]] = load_empty_dictionary
    dispatch[pickle.FRAME[0]] = load_frame


def _plain(value: object) -> Any:
    """Both kinds of inert data as one."""
    if isinstance(value, Global | _Name):
        return "name", (value.module, value.name) if isinstance(value, Global) else value.text
    if isinstance(value, Record | _Made):
        text = (value.callable.module, value.callable.name) if isinstance(value, Record) else value.text
        return "made", text, _plain(value.args), _plain(value.state), [_plain(pair) for pair in value.items or []]
    if isinstance(value, Persistent | _Ref):
        return "reference", _plain(value.value)
    if isinstance(value, Pairs | _Dict):
        return "dict", [_plain(pair) for pair in value]
    return type(value)(map(_plain, value)) if type(value) in (list, tuple) else value


def checkpoint(store: Store) -> None:
    """Small tensors are tiled: every element of the shape lies in one chunk. No two tensors' bytes overlap."""
    for key, (_, shape, places) in store.tensors.items():
        volume = _volume(shape)
        if volume <= 4096:
            cells = [cell for box, _ in places for cell in _cells(box)]
            agree(f"elements of {key}", sorted(cells), sorted(_cells(tuple((0, size) for size in shape))))
    used = sorted({(c.file, c.offset, c.offset + c.nbytes) for spec in store.catalog.values() for c in spec.chunks})
    for (file, _, end), (other, start, _) in pairwise(used):
        if file == other and start < end:
            raise DisagreementError(f"two payloads of {file} overlap at {start}")


def _volume(shape: tuple[int, ...]) -> int:
    volume = 1
    for size in shape:
        volume *= size
    return volume


def _cells(box: tuple[tuple[int, int], ...]) -> list[tuple[int, ...]]:
    cells: list[tuple[int, ...]] = [()]
    for start, stop in box:
        cells = [(*cell, i) for cell in cells for i in range(start, stop)]
    return cells
