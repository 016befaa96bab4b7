"""Bands in the order of their places in the target's files, whatever tensor they are of.

An object of a store is written nearly from its beginning to its end then: few of its parts are open at a time. Workers
take bands from one queue; while one of a tensor waits for those before it, which its digest needs, its bytes come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from transcoder.atlas import Atlas
from transcoder.engine import run_groups
from transcoder.planner import HfTensor
from transcoder.progress import Cancelled, Tally
from transcoder.spec import Box, TensorSpec

Range = tuple[int, int]  # flat elements [start, stop)
Place = tuple[int, int]  # number of a chunk in the order of the files, element in it


class Mover(Protocol):
    """A tensor on its way, range after range."""

    ranges: list[Range]

    def ahead(self, number: int) -> None:
        """Begin to read a range."""

    def step(self, number: int) -> None:
        """Move a range; those before it have been."""

    def finish(self) -> None:
        """All have been moved."""


def move_all(mover: Mover) -> None:
    """Every range of one tensor."""
    for number in range(len(mover.ranges)):
        mover.step(number)
    mover.finish()


class Sequence:
    """Where elements of tensors go, as places that can be compared."""

    def __init__(self, catalog: Mapping[str, TensorSpec], order: Iterable[tuple[str, Box]]) -> None:
        """order: the chunks as they lie in the files; where it has others, each is a file of its own."""
        self._numbers = {place: number for number, place in enumerate(order)}
        boxes = [(key, chunk.box) for key, spec in catalog.items() for chunk in spec.chunks]
        if not self._numbers.keys() >= set(boxes):
            self._numbers = {place: number for number, place in enumerate(boxes)}

    def at(self, key: str, box: Box, element: int) -> Place:
        """The place of an element of a chunk."""
        return self._numbers[key, box], element

    def of(self, atlas: Atlas, tensor: HfTensor, ranges: Iterable[Range]) -> Iterator[Place]:
        """The first place of each range, or that of a range before it: their order stays."""
        last = (0, 0)
        for start, stop in ranges:
            places = (self.at(key, chunk.box, copy.chunk) for key, chunk, copy in atlas.pieces(tensor, start, stop))
            last = max(last, min(places, default=last))
            yield last


Job = tuple[Place, int, int]  # first place, number of the tensor, of its range


def run_ordered(
    jobs: list[Job],
    mover: Callable[[int], Mover],
    others: list[tuple[Place, Callable[[], object]]],
    workers: int,
    tally: Tally,
    attend: Callable[[str], None],
    names: list[str],
) -> None:
    """Run the jobs in order, several at a time, each tensor's one after the other. others: jobs of no tensor.

    mover: of a tensor, by number. attend: told which tensor's range a thread is about to move.
    """
    queue = iter(sorted([*jobs, *((place, -1, number) for number, (place, _) in enumerate(others))]))
    turns, lock = _Turns(mover, tally.stop), threading.Lock()

    def work() -> None:
        while True:
            with lock:
                job = next(queue, None)
                if job is not None and job[1] >= 0:
                    turns.take(job[1])
            if job is None:
                return
            _, tensor, number = job
            if tensor < 0:
                attend("")
                others[number][1]()
            else:
                turns.move(tensor, number, lambda: attend(names[tensor]))  # noqa: B023 (called at once)

    run_groups([[work] for _ in range(workers)], workers, tally.stop)


class _Turns:
    """Tensors on their way, each with the number of the range whose turn it is."""

    def __init__(self, mover: Callable[[int], Mover], stop: threading.Event) -> None:
        self._mover, self._stop = mover, stop
        self._movers: dict[int, Mover] = {}
        self._next: dict[int, int] = {}
        self._changed = threading.Condition()

    def take(self, tensor: int) -> None:
        """A range of this tensor will be moved."""
        if tensor not in self._movers:
            self._movers[tensor], self._next[tensor] = self._mover(tensor), 0

    def move(self, tensor: int, number: int, begin: Callable[[], None]) -> None:
        """Move a range once those before it have been. Raises Cancelled when the run is to end."""
        mover = self._movers[tensor]
        mover.ahead(number)
        with self._changed:
            while self._next[tensor] != number:
                self._changed.wait(0.2)
                if self._stop.is_set():
                    raise Cancelled
        begin()
        mover.step(number)
        if number + 1 == len(mover.ranges):
            mover.finish()
            del self._movers[tensor]
        with self._changed:
            self._next[tensor] += 1
            self._changed.notify_all()
