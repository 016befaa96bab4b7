"""reshard: Megatron → Megatron, through the Hugging Face spelling of every tensor, which both sides share.

Grid, key dialect, norm names, dtype and padding may change at once: each is a property of the target's plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.atlas import Atlas
from transcoder.checks import check_coverage
from transcoder.errors import refuse
from transcoder.exportplan import files_below
from transcoder.formats.foreign import PlainDcp
from transcoder.formats.huggingface import HfDirectory
from transcoder.formats.opening import place
from transcoder.importing import ImportPlan, check_layout, form_notes, wanted_chunks
from transcoder.linking import known_digests, link_files, linked_placement
from transcoder.megatron import Megatron, open_megatron
from transcoder.mesh import Mesh
from transcoder.planner import HfTensor, Model, build_model
from transcoder.progress import Tally
from transcoder.remote.paths import remote
from transcoder.spec import DTYPES, DType
from transcoder.variants import norm_variant

if TYPE_CHECKING:
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import Fetch, Sink
    from transcoder.formats.placement import Placement, Writer
    from transcoder.kept import Kept
    from transcoder.ledger import Ledger, Track
    from transcoder.ordered import Mover
    from transcoder.work import Work


@dataclass(frozen=True)
class ReshardPlan:
    """Where every element lies and where it goes."""

    source: Megatron
    target: ImportPlan  # its source is what is known of the original's files
    link: bool = False  # whether the payload files stay as they are


def plan_reshard(
    src: Path,
    mesh: Mesh,
    *,
    hf_model: Path | None = None,
    arch: str = "",
    layout: str = "",
    norm_names: str = "",
    dtype: str = "",
    divisor: int = 128,
    iteration: int | str = "both",
    link: bool = False,
    form: str = "torch_dist",
) -> ReshardPlan:
    """The plan. layout, norm_names, dtype: as the source has them by default. Raises InputError, UsageError.

    link: leave the payload files as they are; bytes must not have to change.
    """
    check_layout(layout, divisor)
    mesh.check_positive()
    source = open_megatron(src, hf_model, arch, quantised=True)  # in the spelling of its original
    if isinstance(source.store, PlainDcp):
        hint = "export it with mcore2hf, then import that with hf2mcore"
        raise refuse("format", f"{src} has the names of another trainer: {hint}")
    model = _target_model(source, layout, norm_names, 0 if link else mesh.tp * divisor)
    mesh.check(model.limits(), model.sizes["l"])
    target = DTYPES[dtype] if dtype else source.dtype
    placement = _placement(source, model, mesh, target, form, link)
    atlas = Atlas(placement.catalog)
    check_coverage(model, atlas)
    original = _original(source)
    stored = DTYPES[((source.manifest or {}).get("restore") or {"dtype": target.name})["dtype"]]
    padded = model.sizes["vocab"] + model.sizes["pad"]
    plan = ImportPlan(
        original,
        source.architecture,
        model,
        mesh,
        stored,
        target,
        padded,
        placement,
        atlas,
        iteration,
        (),
        (*source.store.left_out(), *form_notes(placement)),
    )
    return ReshardPlan(source, plan, link)


def _placement(source: Megatron, model: Model, mesh: Mesh, dtype: DType, form: str, link: bool) -> Placement:
    if link:
        return linked_placement(source, model, dtype, form)
    wanted = (wanted_chunks(tensor, mesh, dtype) for tensor in model.mcore.values())
    return place(form, wanted, model.objects(), mesh.world)


def _target_model(source: Megatron, layout: str, norm_names: str, divisor: int) -> Model:
    values = {**source.model.values, **norm_variant(source.model.recipe, norm_names)}
    pad = -source.model.sizes["vocab"] % divisor if divisor else source.model.sizes["pad"]
    sizes = {**source.model.sizes, "pad": pad}
    return build_model(source.model.recipe, values, sizes, layout or source.model.dialect)


def _original(source: Megatron) -> HfDirectory:
    """The original's headers and index, and the side files that travel on."""
    folder, origin = source.reference, source.origin
    files, warnings = files_below(folder) if folder else ((), ())
    return HfDirectory(folder or source.path, source.config, origin.shards, origin.index, files, warnings)


def reshard_identity(plan: ReshardPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes this run the same as another one."""
    from transcoder.identity import identity

    source, original = plan.source, plan.target.source
    files = [source.path / name for name in source.everything]
    files += [original.path / name for name in original.side_files]
    sizes = repr(sorted(plan.target.placement.sizes.items())).encode()
    return identity("reshard", options, dict.fromkeys(files), [sizes])


def run_reshard(plan: ReshardPlan, work: Work, *, workers: int, tally: Tally, checksums: str = "") -> list[str]:
    """Write the whole checkpoint, or what an earlier run left of it to write. Returns warnings."""
    from transcoder.importfiles import write_side_files
    from transcoder.kept import copy_file

    target = plan.target
    folder = work.out / target.folder
    if plan.link:
        return _run_linked(plan, work, folder, workers, checksums)
    work.begin({f"{target.folder}/{name}": size for name, size in target.placement.sizes.items()})
    writer = target.placement.writer(folder, work.sync)
    try:
        writer.prepare()
        digests, warnings = _stream(plan, writer, work, workers, tally)
        crcs = writer.finish()
    finally:
        writer.close()
    copy_file(plan.source.path, folder, work.sync)
    write_side_files(target, work.out, digests, crcs, work.sync, workers if checksums else 0)
    return warnings


def _run_linked(plan: ReshardPlan, work: Work, folder: Path, workers: int, checksums: str) -> list[str]:
    from transcoder.importfiles import write_side_files
    from transcoder.kept import copy_file

    work.begin({})
    link_files(plan.source, plan.target.placement, folder, work.sync)
    copy_file(plan.source.path, folder, work.sync)
    tensors, files = known_digests(plan.source, plan.target.placement)
    write_side_files(plan.target, work.out, tensors, files, work.sync, workers if checksums else 0)
    return [] if tensors else ["no manifest is written: the source has none with digests of these files"]


def _stream(
    plan: ReshardPlan, writer: Writer, work: Work, workers: int, tally: Tally
) -> tuple[dict[str, str], list[str]]:
    """Move every payload byte; the digests of the Hugging Face tensors, and warnings."""
    from transcoder.chunks import CheckedChunks
    from transcoder.exporting import check_filler
    from transcoder.kept import Kept
    from transcoder.ledger import READ, Ledger
    from transcoder.maps import Maps
    from transcoder.movers import run_places, run_sets

    source, target, digests = plan.source, plan.target, dict[str, str]()
    chunks, kept = CheckedChunks(Maps(source.path).__getitem__), Kept(source)
    ledger = Ledger(work.journal, writer.sync if work.sync else None)
    ledger.restore(target.placement.catalog, writer.passed)
    ledger.restore(source.store.catalog, chunks.passed, READ)

    def mover(tensor: HfTensor) -> Mover:
        return ReshardMover(plan, tensor, chunks, kept, writer.write, ledger, tally, digests)

    run = run_places if remote(work.out) or remote(source.path) else run_sets
    run(target, target.model.hf.values(), mover, writer.write, workers, tally, ledger)
    warnings = check_filler(source, chunks.fetch)
    chunks.finish()
    ledger.sync()
    return digests, [*warnings, *tally.warnings()]


class ReshardMover:
    """Carries one tensor over, band by band, as Megatron stores it; the digest of its values is noted at the end."""

    def __init__(
        self,
        plan: ReshardPlan,
        tensor: HfTensor,
        chunks: CheckedChunks,
        kept: Kept,
        sink: Sink,
        ledger: Ledger,
        tally: Tally,
        digests: dict[str, str],
    ) -> None:
        from transcoder.engine import bands

        self._plan, self._tensor, self._chunks, self._kept, self._sink = plan, tensor, chunks, kept, sink
        self._ledger, self._tally, self._digests = ledger, tally, digests
        self._here = plan.source.model.hf[tensor.name]
        self._stored, self._dtype = plan.source.stored(self._here), tensor.family.dtype(plan.target.dtype)
        self.ranges = list(bands(tensor.shape, self._dtype))

    @cached_property
    def _track(self) -> Track:
        from transcoder.ledger import Track

        return Track(self._ledger, self._tensor.name, self._tensor.shape, self._dtype)

    @cached_property
    def _fetch(self) -> Fetch:
        from transcoder.ledger import READ

        return self._chunks.reader(self._here, self._track.parts, READ)

    def ahead(self, number: int) -> None:
        """Begin to fetch a range, if it is to be moved."""
        start, stop = self.ranges[number]
        if stop > self._track.stop:
            self._chunks.ahead(self._plan.source.atlas.pieces(self._here, start, stop), self._stored.size)

    def step(self, number: int) -> None:
        """Move a range that no earlier run has moved."""
        from transcoder.engine import carried, converted, gather, received, scatter
        from transcoder.kernels.casts import finite

        (start, stop), tensor, stored, track = self.ranges[number], self._tensor, self._stored, self._track
        if stop > track.stop:
            band = gather(self._plan.source.atlas, self._here, start, stop, stored, self._fetch)
            values = received(self._here, band, stored, self._kept.values(self._here, stored, start, stop))
            track.tree.add(converted(values, stored, self._dtype))
            track.count("odd", not finite(band, stored.name))
            if not tensor.family.rule.alias:
                noted = track.noting(self._sink)
                scatter(
                    self._plan.target.atlas, tensor, start, carried(tensor, band, values, stored, self._dtype), noted
                )
            track.reach(stop)
        self._tally.moved((stop - start) * self._dtype.size)

    def finish(self) -> None:
        """Note the digest."""
        self._tally.finished(self._tensor, odd=bool(self._track.counts.get("odd")))
        self._digests[self._tensor.name] = self._track.tree.text()
