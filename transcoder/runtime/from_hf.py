"""Fills parameter memory from a Hugging Face directory: an import whose chunks are this rank's boxes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import prod
from pathlib import Path
from typing import Any

import torch

from transcoder.atlas import Atlas
from transcoder.dialects import dialect_of
from transcoder.engine import Payloads, sent
from transcoder.importing import ImportPlan, plan_import
from transcoder.mesh import Mesh
from transcoder.planner import HfTensor
from transcoder.runtime.filling import Filled, Reader
from transcoder.runtime.matching import matched
from transcoder.runtime.omitted import optional_parts, sources_of
from transcoder.runtime.shards import Shard, Target, check_whole, on_gpu, shards_of
from transcoder.spec import Chunk, DType, TensorSpec


def fill_from_hf(chunks: Sequence[Any], path: Path, follow_links: bool) -> Filled:
    """Read this rank's part."""
    shards = shards_of(chunks, None)
    count = check_whole(chunks, shards)
    rows = next((shard.shape[0] for shard in shards if shard.flexible), 1)
    layout = dialect_of(shard.key for shard in shards)
    plan = plan_import(path, Mesh(), layout=layout, divisor=rows, follow_links=follow_links)
    shapes = {key: tensor.shape for key, tensor in plan.model.mcore.items()}
    targets, left_out = matched(chunks, shards, shapes, plan.model.sizes["vocab"], optional_parts(plan))
    filling = _HfFilling(plan, targets, follow_links)
    try:
        filling.run()
    finally:
        filling.reader.close()
    return Filled(count, filling.reader.bytes_read, tuple(sources_of(plan, left_out)))


class _HfFilling:
    """An import whose chunks are memory."""

    def __init__(self, plan: ImportPlan, targets: Sequence[Target], follow_links: bool) -> None:
        self.plan, self.targets = plan, targets
        self.atlas = Atlas({key: self._spec(key, ()) for key in plan.model.mcore} | dict(self._specs()))
        self.reader = Reader(plan.source.path, follow_links, on_gpu([target.shard for target in targets]))
        self._payloads: Payloads | None = None

    def _specs(self) -> Iterator[tuple[str, TensorSpec]]:
        chunks: dict[str, list[Chunk]] = {}
        for number, target in enumerate(self.targets):
            chunks.setdefault(target.key, []).append(Chunk(target.box, str(number), 0, target.shard.data.nbytes))
        for key, found in chunks.items():
            yield key, self._spec(key, tuple(found))

    def _spec(self, key: str, chunks: tuple[Chunk, ...]) -> TensorSpec:
        tensor = self.plan.model.mcore[key]
        return TensorSpec(key, tensor.family.dtype(self.plan.dtype), tensor.shape, chunks)

    def _shard(self, chunk: Chunk) -> Shard:
        return self.targets[int(chunk.file)].shard

    def run(self) -> None:
        """Read whatever belongs to this rank, in the order of the files."""
        catalog = self.plan.source.weights.catalog
        tensors = [tensor for tensor in self.plan.model.hf.values() if not tensor.family.rule.alias]
        self._check_counts(tensors)
        for tensor in sorted(tensors, key=lambda each: _place(catalog[each.name])):
            if tensor.name in self.plan.source.weights.codecs or tensor.family.rule.plus:
                self._decoded(tensor, catalog[tensor.name].dtype)
            else:
                self._copied(tensor, catalog[tensor.name])
        zero = torch.zeros(1)
        for _, filler in self.plan.model.fillers():
            for chunk, copy in self.atlas.fillers(filler):
                self._shard(chunk).put(replace(copy, hf=0, hf_steps=(0,) * len(copy.shape)), zero)

    def _check_counts(self, tensors: Sequence[HfTensor]) -> None:
        """Prove that every element of every target is filled once. Raises RuntimeError."""
        filled = [0] * len(self.targets)
        for tensor in tensors:
            for _, chunk, copy in self.atlas.pieces(tensor, 0, prod(tensor.shape)):
                filled[int(chunk.file)] += copy.count
        for _, filler in self.plan.model.fillers():
            for chunk, copy in self.atlas.fillers(filler):
                filled[int(chunk.file)] += copy.count
        for target, count in zip(self.targets, filled, strict=True):
            if count != target.shard.data.numel():
                raise RuntimeError(f"{target.key} {target.box}: {count} of {target.shard.data.numel()} elements")

    def _copied(self, tensor: HfTensor, spec: TensorSpec) -> None:
        """Copies of a tensor that is stored as it is."""
        for _, chunk, copy in self.atlas.pieces(tensor, 0, prod(tensor.shape)):
            self.reader.fill(self._shard(chunk), copy, spec.chunks[0].file, spec.chunks[0].offset, spec.dtype)

    def _decoded(self, tensor: HfTensor, dtype: DType) -> None:
        """Copies of a tensor whose values have to be computed, from the bands that hold some of this rank's."""
        self._payloads = self._payloads or Payloads(self.plan.source)
        for start, stop in self._payloads.bands(tensor.name):
            pieces = list(self.atlas.pieces(tensor, start, stop))
            if not pieces:
                continue
            self.reader.bytes_read += self._payloads.weigh(tensor.name, start, stop)
            band = sent(tensor, self._payloads.read(tensor.name, start, stop), dtype)
            values = torch.from_numpy(band).view(getattr(torch, dtype.name))
            for _, chunk, copy in pieces:
                self._shard(chunk).put(copy, values)


def _place(spec: TensorSpec) -> tuple[str, int]:
    return spec.chunks[0].file, spec.chunks[0].offset
