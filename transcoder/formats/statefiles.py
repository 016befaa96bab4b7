"""What lies beside the tensors of a checkpoint, as plain values: common.pt and metadata.json."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import InputError, Problem, refuse
from transcoder.formats.archive import read_pickle
from transcoder.formats.pickled import brief
from transcoder.formats.pickles import Pairs, Record
from transcoder.hfconfig import read_json
from transcoder.paths import map_file
from transcoder.remote.paths import remote

BACKENDS: dict[str, object] = {
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}


def backend_of(path: Path) -> object:
    """The format that metadata.json names; None where it names none or cannot be read."""
    try:
        table = read_json(path / "metadata.json", 1 << 20)
    except InputError:
        return None
    return table.get("sharded_backend") if isinstance(table, dict) else None


def backend_notes(path: Path, backend: str) -> Iterator[str]:
    """Refuse a metadata.json of another format; megatron-core itself needs the file."""
    if not there(path / "metadata.json"):
        if remote(path):  # where it is written last
            raise refuse("unfinished", f"{path} has no metadata.json: the run that wrote it has not ended")
        yield "there is no metadata.json: megatron-core will not load this checkpoint"
        return
    table = read_json(path / "metadata.json", 1 << 20)
    for field, wanted in {"sharded_backend": backend, **BACKENDS}.items():
        found = table.get(field, wanted if field != "sharded_backend" else None) if isinstance(table, dict) else table
        if found != wanted or type(found) is not type(wanted):
            problem = Problem(file="metadata.json", expected=f"{field} {wanted}", found=f"{found!r:.80}")
            raise refuse("format", f"{field.replace('_', ' ')} {brief(found)} is not supported", [problem])


def dialect_notes(content: object, keys: Iterable[str]) -> Iterator[str]:
    """Where common.pt asks for keys of another dialect than those that are there: Megatron cannot load that."""
    fields = content if isinstance(content, dict) else {}
    layers = [key for key in keys if key.startswith("decoder.layers.")]
    numbered = [key for key in layers if key.removeprefix("decoder.layers.")[:1].isdigit()]
    per_layer = bool(fields.get("singleton_local_shards") or fields.get("non_homogeneous_layers"))
    if layers and fields and per_layer and not numbered:
        yield "content_metadata of common.pt asks for per-layer keys, the keys are stacked: Megatron cannot load it"


def plain(value: object) -> Any:
    """Inert pickle data as plain values: dictionaries with text keys, namespaces as dictionaries, the rest as it is."""
    if isinstance(value, Pairs):
        return {key: plain(item) for key, item in value if isinstance(key, str)}
    if isinstance(value, Record):
        return plain(value.state) if value.state is not None else value
    return [plain(item) for item in value] if isinstance(value, list | tuple) else value


def read_common(path: Path, newer: memoryview | None = None) -> dict[str, Any]:
    """The plain values of common.pt, else of `newer`, the object `common_state` of megatron-core 0.20; {} without both.

    Nothing in them is executed. Raises InputError.
    """
    if there(path / "common.pt"):
        return _common(read_pickle(map_file(path / "common.pt"), None, "common.pt"), "common.pt")
    if newer is None:
        return {}
    root = read_pickle(newer, None, "common_state")
    return _common(root[0] if isinstance(root, list) and len(root) == 1 else root, "common_state")


def _common(root: object, name: str) -> dict[str, Any]:
    if not isinstance(root, Pairs):
        raise refuse("common", f"{name} does not hold a dictionary", [Problem(file=name, found=brief(root))])
    try:
        values = root.as_dict()
    except InputError as error:
        raise refuse("common", f"{name}: {error.args[0]}", [Problem(file=name)]) from error
    if not isinstance(values.get("content_metadata", Pairs()), Pairs | None):
        problem = Problem(file=name, expected="content_metadata, a dictionary", found=brief(values["content_metadata"]))
        raise refuse("common", f"{name} does not say which keys to ask for", [problem])
    return {key: plain(value) for key, value in values.items()}
