"""What a checkpoint holds, from headers alone: keys, dtypes, shapes, chunk grids, files, dialect, parallel layout."""

from __future__ import annotations

import re
from collections.abc import Iterator
from math import prod
from pathlib import Path
from typing import Any

from transcoder.dialects import dialect_of
from transcoder.errors import InputError
from transcoder.formats.huggingface import is_hf, open_hf
from transcoder.formats.opening import open_store
from transcoder.formats.peft import is_peft
from transcoder.formats.rankfiles import RankStore
from transcoder.formats.store import Store
from transcoder.hfconfig import architecture_of, read_config
from transcoder.iterations import find_iteration, notes
from transcoder.outline import Held, natural, outline, tree

CONFIG_FIELDS = (
    "num_layers",
    "hidden_size",
    "ffn_hidden_size",
    "num_attention_heads",
    "num_query_groups",
    "kv_channels",
    "padded_vocab_size",
    "untie_embeddings_and_output_weights",
    "rotary_base",
)


def inspect(
    directory: Path, follow_links: bool = False, html: Path | None = None, as_tree: bool = False
) -> dict[str, Any]:
    """A report on weights or an adapter of any supported format. Raises InputError, OutputError.

    html: where to write it as a page. as_tree: whether it has the names as a tree, too.
    """
    report, tensors = look(directory, follow_links)
    root = outline(tensors) if html or as_tree else None
    if html and root:
        from transcoder.page import write_page

        write_page(html, report, root)
        report["html"] = str(html)
    return report | ({"tree": list(tree(root))} if as_tree and root else {})


def look(directory: Path, follow_links: bool = False) -> tuple[dict[str, Any], list[Held]]:
    """The report, and every tensor with the places of its chunks. Raises InputError."""
    if is_hf(directory):
        return _inspect_hf(directory, follow_links)
    report, tensors = _inspect_megatron(find_iteration(directory))
    return report | {"warnings": [*notes(directory), *report["warnings"]]}, tensors


def _inspect_hf(directory: Path, follow_links: bool) -> tuple[dict[str, Any], list[Held]]:
    source = open_hf(directory, follow_links)
    tensors = [
        Held(spec.name, spec.dtype, spec.shape, tuple((chunk.box, chunk.file, chunk.offset) for chunk in spec.chunks))
        for spec in source.catalog.values()
    ]
    return _report(directory, "peft" if is_peft(directory) else "safetensors", tensors) | {
        "architecture": architecture_of(source.config),
        "files": [{"name": shard.name, "bytes": shard.size} for shard in source.shards],
        "config": {key: value for key, value in source.config.items() if not isinstance(value, dict | list)},
        "warnings": list(source.warnings),
    }, tensors


def _inspect_megatron(folder: Path) -> tuple[dict[str, Any], list[Held]]:
    store = open_store(folder)
    tensors = [
        Held(key, dtype, shape, tuple(sorted((box, item.file, item.offset) for box, item in places)))
        for key, (dtype, shape, places) in sorted(store.tensors.items())
    ]
    found = store.common.get("args")
    arguments = found if isinstance(found, dict) else {}
    return _report(folder, store.form, tensors) | {
        "architecture": _architecture(folder),
        "dialect": _dialect(store.tensors),
        "parallel": _parallel(arguments, store),
        "objects": len(store.objects),
        "files": [{"name": name, "bytes": (folder / name).stat().st_size} for name in _files(folder, store)],
        "config": {name: arguments[name] for name in CONFIG_FIELDS if name in arguments},
        "warnings": [
            *store.warnings,
            *store.left_out(),
        ],
    }, tensors


def _files(folder: Path, store: Store) -> list[str]:
    """Every payload file, those without weights included."""
    return sorted({entry.name for entry in folder.glob("*.distcp")} | set(store.files))


def _report(path: Path, form: str, tensors: list[Held]) -> dict[str, Any]:
    keys = [_row(held) for held in tensors]
    counts = {"tensors": len(keys), "parameters": sum(prod(row["shape"]) for row in keys)}
    return {"source": str(path), "format": form, **counts, "keys": keys}


def _row(held: Held) -> dict[str, Any]:
    boxes, files = [box for box, _, _ in held.places], {file for _, file, _ in held.places}
    grid = [len(set(intervals)) for intervals in zip(*boxes, strict=True)]
    facts = {"key": held.key, "dtype": held.dtype.name, "shape": list(held.shape)}
    return facts | {"grid": grid, "chunks": len(boxes), "files": sorted(files, key=natural)}


def _architecture(folder: Path) -> str:
    try:
        return architecture_of(read_config(folder / "hf"))
    except InputError:
        return ""


def _dialect(keys: Any) -> str:
    try:
        return dialect_of(keys)
    except InputError:
        return "unknown"


def _parallel(arguments: dict[str, Any], store: Store) -> dict[str, Any]:
    """What the files or the training arguments say, and how many ranks wrote payloads."""
    if isinstance(store, RankStore):
        return {**store.sizes, "ranks": len(store.files)}
    names = {"tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size"}
    ranks = {match[1] for name in store.files if (match := re.match(r"__(\d+)_", name))}
    found = {short: arguments[name] for short, name in names.items() if name in arguments}
    return found | ({"ranks": len(ranks)} if ranks else {})


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report as text: a line per key, then files and totals."""
    width = max([len(row["key"]) for row in report["keys"]] + [3])
    for row in report["keys"]:
        grid = "×".join(map(str, row["grid"])) or "1"
        where = row["files"][0] if len(row["files"]) == 1 else f"{len(row['files'])} files"
        yield f"{row['key']:<{width}}  {row['dtype']:<9} {row['shape']!s:<20} {grid:<8} {where}"
    for file in report["files"]:
        yield f"{file['bytes']:>16,} bytes  {file['name']}"
    facts = {name: report[name] for name in ("architecture", "dialect", "parallel", "config") if report.get(name)}
    yield from (f"{name}: {_fact(value)}" for name, value in facts.items())
    yield f"{report['format']}: {report['tensors']} tensors, {report['parameters']:,} parameters"


def _fact(value: Any) -> str:
    return ", ".join(f"{name} {item}" for name, item in value.items()) if isinstance(value, dict) else str(value)
