"""How much of the objects of a store is written at a time: the parts that some band has begun and none has filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING

from transcoder.engine import bands
from transcoder.fillers import filler_ranges
from transcoder.ordered import Place, Sequence
from transcoder.planner import HfTensor
from transcoder.remote.uploads import part_size

if TYPE_CHECKING:
    from transcoder.importing import ImportPlan

LAG = 2  # bands of every worker that may have begun before the one that ends
Extent = tuple[str, int, int]  # file, bytes [start, stop) within which a band writes


def unfinished(plan: ImportPlan) -> Callable[[int], int]:
    """Bytes of the unfinished parts, at most, while so many workers take a plan's bands in order."""
    sizes = plan.placement.sizes
    lives = _lives(sizes, _bands(plan))

    def most(workers: int) -> int:
        changes: list[tuple[int, int]] = []
        for (file, number), (first, last) in lives.items():
            step = part_size(sizes[file])
            room = min(step, sizes[file] - number * step)
            changes += [(first, room), (last + LAG * workers, -room)]
        return max(accumulate(room for _, room in sorted(changes)), default=0)

    return most


def _lives(sizes: Mapping[str, int], order: Iterator[list[Extent]]) -> dict[tuple[str, int], tuple[int, int]]:
    """The first and the last band that writes into each part."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for turn, extents in enumerate(order):
        for file, start, stop in extents:
            step = part_size(sizes[file])
            for number in range(start // step, -(-stop // step)):
                first, _ = found.get((file, number), (turn, turn))
                found[file, number] = first, turn
    return found


def _bands(plan: ImportPlan) -> Iterator[list[Extent]]:
    """Where every band writes, in the order in which they are taken."""
    sequence = Sequence(plan.atlas.catalog, plan.order())
    jobs: list[tuple[Place, int, Callable[[], list[Extent]]]] = []
    for tensor in (tensor for tensor in plan.model.hf.values() if not tensor.family.rule.alias):
        ranges = list(bands(tensor.shape, tensor.family.dtype(plan.dtype)))
        for place, (start, stop) in zip(sequence.of(plan.atlas, tensor, ranges), ranges, strict=True):
            jobs.append((place, len(jobs), partial(_extents, plan, tensor, start, stop)))
    for family, filler in plan.model.fillers():
        dtype = family.dtype(plan.dtype)
        for chunk, start, size in filler_ranges(plan.atlas, filler, dtype):
            place, first = sequence.at(filler.key, chunk.box, start // dtype.size), chunk.offset + start
            jobs.append((place, len(jobs), partial(list, [(chunk.file, first, first + size)])))
    return (extents() for _, _, extents in sorted(jobs))


def _extents(plan: ImportPlan, tensor: HfTensor, start: int, stop: int) -> list[Extent]:
    """Where a band of a tensor goes, from the first byte in each chunk to the last."""
    size, found = tensor.family.dtype(plan.dtype).size, []
    for _, chunk, copy in plan.atlas.pieces(tensor, start, stop):
        reach = sum((count - 1) * step for count, step in zip(copy.shape, copy.chunk_steps, strict=True))
        first = chunk.offset + copy.chunk * size
        found.append((chunk.file, first, first + (reach + 1) * size))
    return found
