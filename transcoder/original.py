"""The Hugging Face files that a checkpoint came from, as far as they are known: headers, index and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transcoder import manifest
from transcoder.codecs import Weights, weights_of
from transcoder.errors import InputError, Problem, refuse
from transcoder.formats.huggingface import HfDirectory
from transcoder.formats.safetensors import INDEX_NAME, Packed, Shard, packed, shard, weight_map
from transcoder.hfconfig import parse_json
from transcoder.paths import plain_name


@dataclass(frozen=True)
class Original:
    """Shards with their headers, the index file, and the weights in them; all empty when nothing is known."""

    shards: tuple[Shard, ...] = ()
    index: Packed | None = None
    weights: Weights = Weights({}, {})  # noqa: RUF009 (never changed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight."""
        return {name: spec.shape for name, spec in self.weights.catalog.items()}


def original_of(directory: HfDirectory | None, table: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Original:
    """The original: a directory that the user gave, else what the manifest holds of it. Raises InputError."""
    if directory is not None:
        return Original(directory.shards, directory.index, directory.weights)
    if table is None or not table["source"]["files"]:  # as after resharding what no original is known of
        return Original()
    shards = kept_headers(table)
    index = kept_index(table)
    catalog = {spec.name: spec for shard in shards for spec in shard.tensors}
    weights = weights_of(catalog, config)
    _check_tensors(table, weights)
    return Original(shards, index, weights)


def kept_headers(table: Mapping[str, Any]) -> tuple[Shard, ...]:
    """The original's shards, as the headers that a manifest keeps have them. Raises InputError."""
    sizes = {row["name"]: row["size"] for row in table["source"]["files"]}
    headers = table["restore"]["headers"]
    return tuple(_shard(name, manifest.unpack(text), sizes[name]) for name, text in headers.items())


def kept_index(table: Mapping[str, Any]) -> Packed | None:
    """The original's index file, which names plain files. Raises InputError."""
    text = table["restore"]["index"]
    if not text:
        return None
    data = manifest.unpack(text)
    try:
        weight_map(parse_json(data), INDEX_NAME)
    except (ValueError, RecursionError) as error:
        if isinstance(error, InputError):
            raise
        raise refuse("manifest", "the index that the manifest keeps is damaged", [Problem(file=INDEX_NAME)]) from error
    return packed(data)


def _check_tensors(table: Mapping[str, Any], weights: Weights) -> None:
    known = {name: list(spec.shape) for name, spec in weights.catalog.items()}
    problems = [
        Problem(
            file=manifest.NAME, tensor=row["name"], expected=f"{known.get(row['name'])}", found=f"{row['shape']!r:.80}"
        )
        for row in table["tensors"]
        if known.get(row["name"]) != row["shape"]
    ]
    if problems:
        raise refuse("manifest", "the manifest's tensors are not those of the headers that it keeps", problems)


def _shard(name: str, header: bytes, size: int) -> Shard:
    if not plain_name(name):
        raise refuse("manifest", "a shard's name is not a plain file name", [Problem(file=name)])
    try:
        return shard(name, header, size)
    except (ValueError, TypeError, RecursionError) as error:
        problem = Problem(file=name, message=str(error))
        raise refuse("manifest", "a header that the manifest keeps is damaged", [problem]) from error
