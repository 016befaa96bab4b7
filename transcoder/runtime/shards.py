"""What a live megatron-core model holds on this rank: boxes of global tensors, each with its memory."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

from transcoder.errors import Problem, refuse
from transcoder.moves import Copy, Run, boxes_of_range, runs
from transcoder.spec import Box


@dataclass(frozen=True, eq=False)
class Shard:
    """A box of a global tensor, and the parameter memory that it is; both have as many dimensions."""

    key: str
    shape: tuple[int, ...]  # of the global tensor
    box: Box
    data: Any
    flexible: bool  # whether rows may be missing or left over: a vocabulary

    @property
    def dtype(self) -> str:
        """Name of the element type."""
        return str(self.data.dtype).removeprefix("torch.")

    @cached_property
    def memory(self) -> memoryview | None:
        """The bytes, where files can be read into them."""
        if self.data.device.type != "cpu" or not self.data.is_contiguous():
            return None
        return memoryview(self.data.view(-1).view(torch.uint8).numpy())

    def put(self, copy: Copy, values: Any) -> None:
        """Do a copy from a flat tensor of any type, on any device."""
        values = values.to(self.data.device)
        if self.data.is_contiguous():
            start = self.data.storage_offset() + copy.chunk
            into = self.data.as_strided(copy.shape or (1,), copy.chunk_steps or (1,), start)
            into.copy_(values.as_strided(copy.shape or (1,), copy.hf_steps or (1,), values.storage_offset() + copy.hf))
            return
        for run in runs(copy):
            self._put_run(run, values)

    def _put_run(self, run: Run, values: Any) -> None:
        """Set elements of memory that is not contiguous, box by box."""
        found = values.as_strided(run.shape or (1,), run.hf_steps or (1,), values.storage_offset() + run.hf)
        flat, done = found.reshape(-1), 0
        for box in boxes_of_range(tuple(self.data.shape), run.chunk, run.chunk + run.count):
            part = self.data[tuple(slice(*each) for each in box)]
            part.copy_(flat[done : done + part.numel()].view(part.shape))
            done += part.numel()


@dataclass(frozen=True)
class Target:
    """A shard and the box of the stored tensor `key` that it is."""

    shard: Shard
    key: str
    box: Box


def shards_of(chunks: Iterable[Any], metadata: dict[str, Any] | None) -> list[Shard]:
    """Every tensor of the model's chunks. metadata: what chooses the key dialect, as in `content_metadata`."""
    with torch.no_grad():
        states = [chunk.sharded_state_dict(metadata=dict(metadata or {})) for chunk in chunks]
        return [_shard(leaf) for leaf in _leaves(states)]


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, ShardedTensor):
        yield value
    elif isinstance(value, ShardedTensorFactory):
        yield from _leaves(value.build())
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _leaves(item)


def _shard(leaf: Any) -> Shard:
    extent = (1,) * leaf.prepend_axis_num + tuple(leaf.local_shape)
    box = tuple((start, start + size) for start, size in zip(leaf.global_offset, extent, strict=True))
    data = leaf.data.detach()[(None,) * leaf.prepend_axis_num]
    return Shard(leaf.key, tuple(leaf.global_shape), box, data, bool(leaf.allow_shape_mismatch))


def on_gpu(shards: Iterable[Shard]) -> bool:
    """Whether some memory is a GPU's."""
    return any(shard.data.is_cuda for shard in shards)


def check_whole(chunks: Sequence[Any], shards: Iterable[Shard]) -> int:
    """The elements of all parameters and persistent buffers. Raises InputError for those that no shard is memory of."""
    wanted = sorted(_tensors(chunks), key=lambda item: int(item[1].data_ptr()))
    starts = [tensor.data_ptr() for _, tensor in wanted]
    filled = [0] * len(wanted)
    seen: set[tuple[int, int]] = set()
    for shard in shards:
        place = bisect_right(starts, shard.data.data_ptr()) - 1
        if place >= 0 and shard.data.data_ptr() < starts[place] + wanted[place][1].nbytes:
            again = (shard.data.data_ptr(), shard.data.numel()) in seen
            filled[place] += 0 if again else shard.data.numel()
            seen.add((shard.data.data_ptr(), shard.data.numel()))
    problems = [
        Problem(tensor=name, expected=f"{tensor.numel()} elements in sharded_state_dict()", found=f"{count} in place")
        for (name, tensor), count in zip(wanted, filled, strict=True)
        if count != tensor.numel()
    ]
    if problems:
        raise refuse("model", f"{len(problems)} tensors of the model cannot be filled in place", problems)
    return sum(filled)


def _tensors(chunks: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Parameters and persistent buffers by name, shared ones once."""
    seen: set[int] = set()
    for chunk in chunks:
        for prefix, module in chunk.named_modules():
            kept = {
                name: each for name, each in module._buffers.items() if name not in module._non_persistent_buffers_set
            }
            for name, tensor in {**module._parameters, **kept}.items():
                if tensor is not None and tensor.numel() and id(tensor) not in seen:
                    seen.add(id(tensor))
                    yield f"{prefix}.{name}".lstrip("."), tensor
