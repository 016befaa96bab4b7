"""The bytes of an import on their way: tensor after tensor within each file set, or in the order of their places."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import cached_property, partial
from typing import TYPE_CHECKING

from transcoder.engine import Payloads, run_groups, scatter, sent
from transcoder.errors import Problem, refuse
from transcoder.fillers import fill, filler_ranges, zeros
from transcoder.formats.placement import SETS
from transcoder.kernels.casts import finite
from transcoder.ledger import Ledger, Track
from transcoder.merging import Merger
from transcoder.ordered import Job, Mover, Place, Sequence, move_all, run_ordered
from transcoder.planner import HfTensor, Model
from transcoder.progress import Tally
from transcoder.turned import strokes

if TYPE_CHECKING:
    from transcoder.engine import Sink
    from transcoder.importing import ImportPlan


def stream_import(
    plan: ImportPlan, sink: Sink, workers: int, tally: Tally, ledger: Ledger | None = None, ordered: bool = False
) -> dict[str, str]:
    """Move every payload byte. Returns the digest of each Hugging Face tensor, in the checkpoint's dtype.

    ordered: by the places in the target, as object stores need it.
    """
    payloads, merger = Payloads(plan.source), Merger(plan.merge)
    catalog, digests = plan.source.weights.catalog, dict[str, str]()

    def mover(tensor: HfTensor) -> Mover:
        return ImportMover(plan, tensor, payloads, merger, sink, tally, ledger, digests)

    order = {name: (spec.chunks[0].file, spec.chunks[0].offset) for name, spec in catalog.items()}
    tensors = sorted(plan.model.hf.values(), key=lambda tensor: order[tensor.name])
    run = run_places if ordered else run_sets
    run(plan, tensors, mover, sink, workers, tally, ledger)
    check_aliases(plan.model, digests)
    return digests


def run_sets(
    plan: ImportPlan,
    tensors: Iterable[HfTensor],
    mover: Callable[[HfTensor], Mover],
    sink: Sink,
    workers: int,
    tally: Tally,
    ledger: Ledger | None = None,
) -> None:
    """Move every tensor, in this order within each of the file sets, then write what no tensor supplies."""
    groups: list[list[Callable[[], None]]] = [[] for _ in range(SETS)]
    for tensor in tensors:
        groups[plan.placement.sets[tensor.key]].append(lambda tensor=tensor: move_all(mover(tensor)))  # type: ignore[misc]
    for family, filler in plan.model.fillers():
        job = partial(fill, plan.atlas, filler, family.dtype(plan.dtype), sink)
        groups[plan.placement.sets[filler.key]].append(job)
    run_groups(groups, workers, tally.stop)


def run_places(
    plan: ImportPlan,
    tensors: Iterable[HfTensor],
    mover: Callable[[HfTensor], Mover],
    sink: Sink,
    workers: int,
    tally: Tally,
    ledger: Ledger | None = None,
) -> None:
    """The same, band by band in the order of the places where they go, and so are the places without a tensor."""
    sequence = Sequence(plan.atlas.catalog, plan.order())
    found, jobs, others = list(tensors), list[Job](), list[tuple[Place, Callable[[], object]]]()
    for number, tensor in enumerate(found):
        ranges = mover(tensor).ranges
        jobs += [(place, number, i) for i, place in enumerate(sequence.of(plan.atlas, tensor, ranges))]
        if not ranges:
            others.append(((0, 0), partial(move_all, mover(tensor))))
    for family, filler in plan.model.fillers():
        dtype = family.dtype(plan.dtype)
        for chunk, start, size in filler_ranges(plan.atlas, filler, dtype):
            place = sequence.at(filler.key, chunk.box, start // dtype.size)
            others.append((place, partial(sink, filler.key, chunk, start, zeros(size))))
    attend = ledger.attend if ledger else lambda name: None
    names = [tensor.name for tensor in found]
    run_ordered(jobs, lambda number: mover(found[number]), others, workers, tally, attend, names)


class ImportMover:
    """Sends one tensor to its chunks, range after range; its digest is noted at the end."""

    def __init__(
        self,
        plan: ImportPlan,
        tensor: HfTensor,
        payloads: Payloads,
        merger: Merger,
        sink: Sink,
        tally: Tally,
        ledger: Ledger | None,
        digests: dict[str, str],
    ) -> None:
        self._plan, self._tensor, self._payloads, self._sink, self._tally = plan, tensor, payloads, sink, tally
        self._merger, self._ledger, self._digests = merger, ledger, digests
        self._stored, self._target = plan.source.weights.catalog[tensor.name].dtype, tensor.family.dtype(plan.dtype)
        self.ranges = list(payloads.bands(tensor.name))
        changed = self._stored != self._target or any(
            tensor.name in names for names in (payloads.weights.codecs, plan.merge.names)
        )
        if not changed:  # in place: a longer range needs no memory
            self.ranges = strokes(plan.atlas, tensor, self.ranges)

    @cached_property
    def _track(self) -> Track:
        return Track(self._ledger, self._tensor.name, self._tensor.shape, self._target)

    def ahead(self, number: int) -> None:
        """Begin to fetch a range, if it is to be moved."""
        start, stop = self.ranges[number]
        if stop > self._track.stop:
            self._payloads.ahead(self._tensor.name, start, stop)

    def step(self, number: int) -> None:
        """Move a range that no earlier run has moved."""
        (start, stop), tensor, track = self.ranges[number], self._tensor, self._track
        if stop > track.stop:
            values = self._payloads.read(tensor.name, start, stop)
            track.count("odd", not finite(values, self._stored.name))
            band = self._merger.converted(tensor, start, values, self._stored, self._target)
            track.tree.add(band)
            if not tensor.family.rule.alias:
                noted = track.noting(self._sink)
                scatter(self._plan.atlas, tensor, start, sent(tensor, band, self._target), noted)
            track.reach(stop)
        self._tally.moved(self._payloads.weigh(tensor.name, start, stop))

    def finish(self) -> None:
        """Note the digest."""
        self._tally.finished(self._tensor, odd=bool(self._track.counts.get("odd")))
        self._digests[self._tensor.name] = self._track.tree.text()


def check_aliases(model: Model, digests: Mapping[str, str]) -> None:
    """Refuse copies of a tensor that are not equal to it. Raises InputError naming each."""
    originals = {_parameter(tensor): tensor.name for tensor in model.hf.values() if not tensor.family.rule.alias}
    pairs = [(name, originals[_parameter(t)], t.family.rule) for name, t in model.hf.items() if t.family.rule.alias]
    problems = [
        Problem(tensor=name, rule=rule.label, expected=f"the same values as {original}", found="other values")
        for name, original, rule in pairs
        if digests[name] != digests[original]
    ]
    if problems:
        hint = model.alias_hint or "Megatron has one tensor for both"
        raise refuse("alias", f"{len(problems)} tensors differ from those that they repeat: {hint}", problems)


def _parameter(tensor: HfTensor) -> tuple[str, tuple[tuple[str, int], ...]]:
    """Which Megatron parameter a tensor is, or repeats."""
    axes = {axis for side in tensor.family.rule.mcore for axis in side.name_axes}
    return tensor.key, tuple(sorted((axis, i) for axis, i in tensor.index.items() if axis in axes))
