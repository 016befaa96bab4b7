"""hf2mcore: plan from headers, prove, then stream into a Megatron checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import product as combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.atlas import Atlas
from transcoder.checks import check_coverage, check_hf, ignored_names
from transcoder.codecs import not_quantised
from transcoder.dialects import DIALECTS
from transcoder.errors import Problem, UsageError, refuse
from transcoder.formats.huggingface import HfDirectory, open_hf
from transcoder.formats.opening import NOTES, place
from transcoder.formats.placement import Placement, Wanted
from transcoder.formats.safetensors import INDEX_NAME
from transcoder.hfconfig import architecture_of, normalise
from transcoder.mesh import Mesh
from transcoder.notation import LayoutError
from transcoder.planner import McoreTensor, Model, build_model
from transcoder.progress import Tally
from transcoder.recipe import Recipe
from transcoder.recipes import recipe_for
from transcoder.remote.paths import remote
from transcoder.sizing import axis_sizes, given_sizes
from transcoder.spec import DTYPES, Box, DType
from transcoder.updates import Merge, merge_of
from transcoder.variants import import_variants

if TYPE_CHECKING:
    from transcoder.work import Work


@dataclass(frozen=True)
class ImportPlan:
    """Everything decided before a payload byte is read."""

    source: HfDirectory
    architecture: str  # the Hugging Face class
    model: Model
    mesh: Mesh
    stored: DType  # of the files
    dtype: DType  # of the checkpoint
    padded_vocab: int
    placement: Placement
    atlas: Atlas
    iteration: int | str
    ignored: tuple[str, ...]  # tensors of the source that only an export needs
    warnings: tuple[str, ...] = field(default=())
    merge: Merge = field(default_factory=Merge)
    peft: Mapping[str, Any] | None = None  # of an adapter's checkpoint: what run_config.yaml says of it
    base: Path | None = None  # of an adapter: the directory of the model that it belongs to

    @property
    def folder(self) -> str:
        """The iteration directory's name."""
        return "release" if self.iteration == "release" else f"iter_{self.step:07d}"

    def order(self) -> list[tuple[str, Box]]:
        """Every chunk of ranks' files, by key and box, in the order in which it lies there: layer by layer."""
        found = (wanted_chunks(tensor, self.mesh, self.dtype) for tensor in self.model.mcore.values())
        wanted = sorted(found, key=lambda tensor: tensor.name)
        rows = sorted((order, n, i) for n, tensor in enumerate(wanted) for i, (_, _, order) in enumerate(tensor.chunks))
        return [(wanted[n].name, wanted[n].chunks[i][0]) for _, n, i in rows]

    @property
    def step(self) -> int:
        """The iteration as a number."""
        return self.iteration if isinstance(self.iteration, int) else 0


def plan_import(
    src: Path,
    mesh: Mesh,
    *,
    layout: str = "",
    dtype: str = "",
    divisor: int = 128,
    iteration: int | str = "both",
    arch: str = "",
    norm_names: str = "",
    mtp: str = "keep",
    merge_adapter: Path | None = None,
    follow_links: bool = False,
    form: str = "torch_dist",
) -> ImportPlan:
    """The plan of an import. Raises InputError listing every problem, UsageError for a grid that does not fit."""
    check_layout(layout, divisor)
    if mtp not in ("keep", "drop"):
        raise UsageError(f"mtp {mtp!r}: give keep or drop", kind="mtp")
    mesh.check_positive()
    source = open_hf(src, follow_links)
    catalog = source.weights.catalog
    architecture = arch or architecture_of(source.config)
    model, dropped = _model(source, recipe_for(architecture), mesh.tp * divisor, layout, norm_names, mtp)
    mesh.check(model.limits(), model.sizes["l"])
    stored, warnings = _stored_dtype(source, model.values)
    ignored = ignored_names(model, catalog)
    check_hf(model, catalog, stored, ignored | dropped)
    target = DTYPES[dtype] if dtype else stored
    wanted = [wanted_chunks(tensor, mesh, target) for tensor in model.mcore.values()]
    placement = place(form, wanted, model.objects(), mesh.world)
    atlas = Atlas(placement.catalog)
    check_coverage(model, atlas)
    merge = merge_of(merge_adapter, model, follow_links)
    notes = (*_remarks(source, model, warnings, ignored, dropped), *form_notes(placement), *merge.warnings)
    padded = model.sizes["vocab"] + model.sizes["pad"]
    return ImportPlan(
        source,
        architecture,
        model,
        mesh,
        stored,
        target,
        padded,
        placement,
        atlas,
        iteration,
        tuple(sorted(ignored)),
        notes,
        merge,
    )


def form_notes(placement: Placement) -> list[str]:
    """What to know of the format that is written."""
    return [NOTES[placement.form]] if placement.form in NOTES else []


def check_layout(layout: str, divisor: int) -> None:
    """Refuse what no checkpoint can have. Raises UsageError."""
    if layout and layout not in DIALECTS:
        raise UsageError(f"layout {layout!r}: give one of {', '.join(DIALECTS)}", kind="layout")
    if divisor < 1:
        raise UsageError(f"--make-vocab-size-divisible-by {divisor}: give a number of 1 or more", kind="vocabulary")


def _remarks(
    source: HfDirectory, model: Model, warnings: list[str], ignored: set[str], dropped: set[str]
) -> Iterator[str]:
    yield from source.warnings
    yield from not_quantised(source.weights, source.config)
    yield from warnings
    yield from (f"weights only: {reason}" for reason in model.weights_only())
    yield from (f"{name} is ignored by the recipe" for name in sorted(ignored))
    if dropped:
        yield f"{len(dropped)} tensors of multi-token prediction are dropped"


def _model(
    source: HfDirectory, recipe: Recipe, divisor: int, layout: str, norm_names: str, mtp: str
) -> tuple[Model, set[str]]:
    """The model of a directory, and the names of the tensors that are left out on request."""
    catalog = source.weights.catalog
    values = normalise(source.config, recipe.defaults)
    shapes = {name: spec.shape for name, spec in catalog.items()}
    values |= import_variants(recipe, shapes, given_sizes(recipe, values)[0], norm_names)
    largest = max([1, *(size for spec in catalog.values() for size in spec.shape)])
    sizes = axis_sizes(recipe, values, len(catalog), largest)
    sizes["pad"] = -sizes["vocab"] % divisor
    model = build_model(recipe, values, sizes, layout)
    if mtp != "drop" or values.get("mtp") != "keep":
        return model, set()
    less = build_model(recipe, values | {"mtp": "drop"}, sizes, layout)
    return less, set(model.hf) - set(less.hf)


def _stored_dtype(source: HfDirectory, values: Mapping[str, Any]) -> tuple[DType, list[str]]:
    found: dict[str, int] = {}
    for spec in source.weights.catalog.values():
        found[spec.dtype.name] = found.get(spec.dtype.name, 0) + spec.nbytes
    declared = values.get("dtype")
    name = declared if declared in found else max(found, key=lambda key: found[key], default="")
    if name not in ("bfloat16", "float16", "float32"):
        problem = Problem(
            file=source.shards[0].name, expected="bfloat16, float16 or float32", found=name or "no tensors"
        )
        raise refuse("dtype", "weights of this type cannot be converted", [problem])
    disagrees = declared is not None and declared != name
    return DTYPES[name], [f"config.json says {declared}, the files hold {name}"] if disagrees else []


def wanted_chunks(tensor: McoreTensor, mesh: Mesh, dtype: DType) -> Wanted:
    """Its chunks: box, rank, and the layer, which is the order within a file."""
    family, layout = tensor.family, tensor.family.mcore[tensor.part].layout
    layers, last = family.sizes["l"], family.rule.stage == "last"
    try:
        cuts = layout.cuts(family.sizes, mesh.sizes)
    except LayoutError as error:
        raise UsageError(f"--tp {mesh.tp}: {tensor.name}: {error}", kind="mesh") from error
    chunks = []
    for parts in combinations(*cuts):
        at = {**tensor.index, **{name: i for part in parts for name, i in part.at}}
        order = at.get("l", layers if last else -1)
        stage = mesh.stage(order, layers) if "l" in at else (mesh.pp - 1) * last
        rank = mesh.rank(stage, at, family.sizes.get("e", 0) or 1)
        chunks.append((tuple((part.start, part.stop) for part in parts), rank, order))
    return Wanted(tensor.name, family.dtype(dtype), tensor.shape, tuple(chunks))


def import_identity(plan: ImportPlan, options: Mapping[str, Any]) -> dict[str, Any]:
    """What makes this run the same as another one."""
    from transcoder.identity import identity

    source = plan.source
    names = [*(shard.name for shard in source.shards), *source.side_files]
    files = [source.path / name for name in (*names, INDEX_NAME) if name != INDEX_NAME or source.index is not None]
    files += [plan.base / "config.json"] if plan.base else []
    decided = (repr(sorted(plan.placement.sizes.items())).encode(), *(shard.header for shard in source.shards))
    return identity("hf2mcore", options, [*files, *plan.merge.files], decided)


def run_import(plan: ImportPlan, work: Work, *, workers: int, tally: Tally, checksums: str = "") -> list[str]:
    """Write the whole checkpoint, or what an earlier run left of it to write. Returns warnings."""
    from transcoder.importfiles import write_side_files
    from transcoder.kept import NAME as KEPT
    from transcoder.kept import write_kept
    from transcoder.ledger import Ledger
    from transcoder.movers import stream_import

    folder = work.out / plan.folder
    work.begin({f"{plan.folder}/{name}": size for name, size in plan.placement.sizes.items()})
    writer = plan.placement.writer(folder, work.sync)
    ledger = Ledger(work.journal, writer.sync if work.sync else None)
    try:
        writer.prepare()
        ledger.restore(plan.placement.catalog, writer.passed)
        ordered = bool(remote(work.out) or remote(plan.source.path))
        digests = stream_import(plan, writer.write, workers, tally, ledger, ordered)
        warnings = [*write_kept(plan, folder / KEPT, work.sync), *tally.warnings()]
        crcs = writer.finish()
        ledger.sync()
    finally:
        writer.close()
    write_side_files(plan, work.out, digests, crcs, work.sync, workers if checksums else 0)
    return warnings
