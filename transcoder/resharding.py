"""reshard: Megatron → Megatron, through the Hugging Face spelling of every tensor, which both sides share.

Grid, key dialect, norm names, dtype and padding may change at once: each is a property of the target's plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.atlas import Atlas
from transcoder.checks import check_coverage
from transcoder.errors import UsageError
from transcoder.exportplan import files_below
from transcoder.formats.huggingface import HfDirectory
from transcoder.formats.torch_dist_writer import TorchDistWriter, place
from transcoder.importing import ImportPlan, check_layout, run_sets, wanted_chunks
from transcoder.linking import known_digests, link_files, linked_placement
from transcoder.megatron import Megatron, open_megatron
from transcoder.mesh import Mesh
from transcoder.planner import HfTensor, Model, build_model
from transcoder.progress import Tally
from transcoder.spec import DTYPES

if TYPE_CHECKING:
    from transcoder.chunks import CheckedChunks
    from transcoder.engine import Sink
    from transcoder.kept import Kept
    from transcoder.ledger import Ledger
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
) -> ReshardPlan:
    """The plan. layout, norm_names, dtype: as the source has them by default. Raises InputError, UsageError.

    link: leave the payload files as they are; bytes must not have to change.
    """
    check_layout(layout, divisor)
    mesh.check_positive()
    source = open_megatron(src, hf_model, arch, quantised=True)  # in the spelling of its original
    model = _target_model(source, layout, norm_names, 0 if link else mesh.tp * divisor)
    mesh.check(model.limits(), model.sizes["l"])
    target = DTYPES[dtype] if dtype else source.dtype
    wanted = [] if link else [wanted_chunks(tensor, mesh, target) for tensor in model.mcore.values()]
    placement = linked_placement(source, model, target) if link else place(wanted, model.objects(), mesh.world)
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
        _notes(source),
    )
    return ReshardPlan(source, plan, link)


def _target_model(source: Megatron, layout: str, norm_names: str, divisor: int) -> Model:
    values, choices = dict(source.model.values), source.model.recipe.mcore_variants.get("norm", {})
    if norm_names and norm_names not in choices:
        raise UsageError(f"--norm-names {norm_names}: megatron-core stores this model with te names", kind="layout")
    values |= {"norm": norm_names} if norm_names else {}
    pad = -source.model.sizes["vocab"] % divisor if divisor else source.model.sizes["pad"]
    sizes = {**source.model.sizes, "pad": pad}
    return build_model(source.model.recipe, values, sizes, layout or source.model.dialect)


def _original(source: Megatron) -> HfDirectory:
    """The original's headers and index, and the side files that travel on."""
    folder, origin = source.reference, source.origin
    files, warnings = files_below(folder) if folder else ((), ())
    return HfDirectory(folder or source.path, source.config, origin.shards, origin.index, files, warnings)


def _notes(source: Megatron) -> tuple[str, ...]:
    ignored = source.store.ignored.items()
    return tuple(f"{count} keys {prefix}* are training state and are left out" for prefix, count in ignored)


def reshard_identity(plan: ReshardPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes this run the same as another one."""
    from transcoder.identity import identity

    source, original = plan.source, plan.target.source
    files = [source.path / name for name in (".metadata", *source.files)]
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
    writer = TorchDistWriter(folder, target.placement, work.sync)
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
    plan: ReshardPlan, writer: TorchDistWriter, work: Work, workers: int, tally: Tally
) -> tuple[dict[str, str], list[str]]:
    """Move every payload byte; the digests of the Hugging Face tensors, and warnings."""
    from transcoder.chunks import CheckedChunks
    from transcoder.exporting import check_filler
    from transcoder.kept import Kept
    from transcoder.ledger import READ, Ledger
    from transcoder.paths import extent

    source, target, digests = plan.source, plan.target, dict[str, str]()
    views = {name: extent(source.path / name) for name in source.files}
    chunks, kept = CheckedChunks(views.__getitem__), Kept(source)
    ledger = Ledger(work.journal, writer.sync if work.sync else None)
    ledger.restore(target.placement.catalog, writer.passed)
    ledger.restore(source.store.catalog, chunks.passed, READ)

    def move(tensor: HfTensor) -> None:
        digests[tensor.name] = _move(plan, tensor, chunks, kept, writer.write, ledger, tally)

    run_sets(target, target.model.hf.values(), move, writer.write, workers, tally)
    warnings = check_filler(source, chunks.fetch)
    chunks.finish()
    ledger.sync()
    return digests, [*warnings, *tally.warnings()]


def _move(
    plan: ReshardPlan,
    tensor: HfTensor,
    chunks: CheckedChunks,
    kept: Kept,
    sink: Sink,
    ledger: Ledger,
    tally: Tally,
) -> str:
    """Carry one tensor over, band by band, as Megatron stores it. Returns the digest of its values."""
    from transcoder.engine import bands, converted, gather, received, scatter
    from transcoder.kernels.casts import finite
    from transcoder.ledger import READ, Track

    here = plan.source.model.hf[tensor.name]
    stored, dtype = plan.source.stored(here), tensor.family.dtype(plan.target.dtype)
    track = Track(ledger, tensor.name, tensor.shape, dtype)
    noted, fetch = track.noting(sink), chunks.reader(here, track.parts, READ)
    for start, stop in bands(tensor.shape, dtype):
        if stop > track.stop:
            band = gather(plan.source.atlas, here, start, stop, stored, fetch)
            values = received(here, band, stored, kept.values(here, stored, start, stop))
            track.tree.add(converted(values, stored, dtype))
            track.count("odd", not finite(band, stored.name))
            if not tensor.family.rule.alias:
                scatter(plan.target.atlas, tensor, start, converted(band, stored, dtype), noted)
            track.reach(stop)
        tally.moved((stop - start) * dtype.size)
    tally.finished(tensor, odd=bool(track.counts.get("odd")))
    return track.tree.text()
