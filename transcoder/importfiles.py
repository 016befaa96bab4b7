"""Everything beside the payloads of an import, in order: common.pt, side files, manifest, index, trackers."""

from __future__ import annotations

import errno
import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transcoder import manifest
from transcoder.checksums import sums
from transcoder.disk import write_file
from transcoder.formats.huggingface import HfDirectory
from transcoder.formats.mcore import common_pt, run_config, train_state
from transcoder.identity import TOOL_VERSION
from transcoder.importing import ImportPlan
from transcoder.iterations import STATE_TRACKER, TEXT_TRACKER
from transcoder.kept import NAME as KEPT
from transcoder.mapped import side_file
from transcoder.paths import map_file

Small = dict[str, bytes | memoryview]  # files by name
TOKENIZER_FILES = (
    "tokenizer",
    "vocab",
    "merges",
    "special_tokens",
    "added_tokens",
    "chat_template",
    "spiece",
    "sentencepiece",
)


def write_side_files(
    plan: ImportPlan,
    work: Path,
    digests: Mapping[str, str] | None,
    payloads: Mapping[str, str],
    sync: bool,
    hashing: int = 0,
) -> None:
    """Write every small file of the checkpoint; `metadata.json` is the last of the iteration, then the trackers.

    digests: of Hugging Face tensors, for the manifest; without them none is written. payloads: digests of files.
    hashing: how many workers take the SHA-256 of every file for the manifest, too; 0 for none.
    """
    folder, files = work / plan.folder, _side_files(plan)
    last: Small = {**plan.placement.index()}
    trackers = _trackers(plan, linked=plan.iteration == "both" and _link(work / "release", plan.folder))
    small: Small = {**files, **last, **{f"../{name}": data for name, data in trackers.items()}}
    if (folder / KEPT).exists():
        small[KEPT] = map_file(folder / KEPT)
    rows = [_row(name, data, bool(hashing)) for name, data in small.items()]
    rows += _payload_rows(plan, folder, payloads, hashing)
    if digests is not None:
        table = _table(plan, digests, sorted(rows, key=lambda row: str(row["name"])))
        files[manifest.NAME] = manifest.emit(table)
    for name, data in {**files, **last}.items():
        write_file(folder / name, data, sync)
    plan.placement.confirm(folder)
    for name, data in trackers.items():
        write_file(work / name, data, sync)


def _side_files(plan: ImportPlan) -> Small:
    fields, mesh = plan.model.fields(), plan.mesh
    dtype, dialect = plan.dtype.name, plan.model.dialect
    files: Small = {
        "common.pt": common_pt(fields, dtype, plan.padded_vocab, mesh.tp, mesh.pp, plan.step, dialect),
        "run_config.yaml": run_config(fields, dtype).encode(),
        "train_state.pt": train_state(plan.step),
    }
    for name in plan.source.side_files:
        data = side_file(plan.source.path, name)
        files[f"hf/{name}"] = data
        if _is_tokenizer_file(name):
            files[f"tokenizer/{name}"] = data
    return files


def _row(name: str, data: bytes | memoryview, hashing: bool) -> dict[str, Any]:
    row = {"name": name, "size": len(data), "digest": manifest.file_digest(data)}
    return row | {"sha256": hashlib.sha256(data).hexdigest()} if hashing else row


def _payload_rows(
    plan: ImportPlan, folder: Path, payloads: Mapping[str, str], hashing: int
) -> Iterator[dict[str, Any]]:
    hashes = sums(folder, payloads, hashing) if hashing else {}
    for name, digest in payloads.items():
        row = {"name": name, "size": plan.placement.sizes[name], "digest": digest}
        yield row | {"sha256": hashes[name]} if hashing else row


def _link(link: Path, folder: str) -> bool:
    """Whether the link could be made: some file systems have none. Raises OSError for any other reason."""
    try:
        link.symlink_to(folder)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return False
    return True


def _trackers(plan: ImportPlan, linked: bool) -> dict[str, bytes]:
    if plan.iteration == "release":
        return {TEXT_TRACKER: b"release"}
    text = "release" if linked else str(plan.step)
    return {TEXT_TRACKER: text.encode(), STATE_TRACKER: train_state(plan.step)}


def _table(plan: ImportPlan, digests: Mapping[str, str], files: list[dict[str, Any]]) -> dict[str, Any]:
    original = plan.source.weights.catalog
    tensors = (
        {
            "name": name,
            "dtype": tensor.family.dtype(plan.dtype).safetensors,
            "shape": list(tensor.shape),
            "tree": digests[name],
            "exact": name in original and original[name].dtype == tensor.family.dtype(plan.dtype),
        }
        for name, tensor in plan.model.hf.items()
    )
    return {
        "format": "transcode-manifest",
        "version": 1,
        "tool": TOOL_VERSION,
        "direction": "hf2mcore",
        "recipe": plan.model.recipe.name,
        "layout": plan.model.dialect,
        "variants": {name: plan.model.values[name] for name in plan.model.recipe.hf_variants},
        "folder": plan.folder,
        "source": {
            "kind": "safetensors",
            "files": [{"name": shard.name, "size": shard.size} for shard in plan.source.shards],
        },
        "tensors": tensors,
        "files": files,
        "restore": restore_table(plan.source) | {"vocab_size": plan.model.sizes["vocab"], "dtype": plan.stored.name},
    }


def restore_table(source: HfDirectory) -> dict[str, Any]:
    """Header bytes of every shard and the index file, packed."""
    headers = {shard.name: manifest.pack(shard.header) for shard in source.shards}
    return {"headers": headers, "index": manifest.pack(source.index.data) if source.index is not None else ""}


def _is_tokenizer_file(name: str) -> bool:
    return "/" not in name and name.startswith(TOKENIZER_FILES)
