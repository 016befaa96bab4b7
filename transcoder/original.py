"""The Hugging Face files that a checkpoint came from, as far as they are known: headers, index and what they mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transcoder import manifest
from transcoder.codecs import Weights, weights_of
from transcoder.errors import Problem, refuse
from transcoder.formats.huggingface import HfDirectory
from transcoder.formats.safetensors import Shard, plain_name, shard_tensors


@dataclass(frozen=True)
class Original:
    """Shards with their headers, the index file, and the weights in them; all empty when nothing is known."""

    shards: tuple[Shard, ...] = ()
    index: bytes | None = None
    weights: Weights = Weights({}, {})  # noqa: RUF009 (never changed)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every weight."""
        return {name: spec.shape for name, spec in self.weights.catalog.items()}


def original_of(directory: HfDirectory | None, table: Mapping[str, Any] | None, config: Mapping[str, Any]) -> Original:
    """The original: a directory that the user gave, else what the manifest holds of it. Raises InputError."""
    if directory is not None:
        return Original(directory.shards, directory.index, directory.weights)
    if table is None:
        return Original()
    restore = table["restore"]
    sizes = {row["name"]: row["size"] for row in table["source"]["files"]}
    shards = tuple(_shard(name, manifest.unpack(text), sizes[name]) for name, text in restore["headers"].items())
    index = manifest.unpack(restore["index"]) if restore["index"] else None
    catalog = {spec.name: spec for shard in shards for spec in shard.tensors}
    return Original(shards, index, weights_of(catalog, config))


def _shard(name: str, header: bytes, size: int) -> Shard:
    if not plain_name(name):
        raise refuse("manifest", "a shard's name is not a plain file name", [Problem(file=name)])
    return Shard(name, size, header, shard_tensors(name, header, size))
