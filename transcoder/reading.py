"""What reads and writes nothing: comparing, checking, inspecting, listing; each returns a report of plain values."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from transcoder.errors import DifferenceError, PathLike, Problem
from transcoder.places import place

if TYPE_CHECKING:
    from transcoder.exportplan import ExportPlan
    from transcoder.importing import ImportPlan
    from transcoder.progress import Listener
    from transcoder.resharding import ReshardPlan
    from transcoder.views import View

CLAIMS = ("names", "mcore", "logits", "quantised", "export")
UNPROVED = dict.fromkeys(CLAIMS, False)


def stream_hf(path: PathLike, hf_model: PathLike | None = None) -> Iterator[tuple[str, Any]]:
    """Yield (Hugging Face name, NumPy array) for each tensor of a checkpoint, one at a time.

    bfloat16, which NumPy lacks, comes as uint16 bits. Raises InputError.
    """
    from math import prod

    from transcoder.views import numpy_dtype, open_view

    view = open_view(place(path), place(hf_model) if hf_model else None)
    for name, (dtype, shape) in view.tensors.items():
        yield name, view.read(name, 0, prod(shape)).view(numpy_dtype(dtype)).reshape(shape)


def verify(one: PathLike, two: PathLike, *, follow_links: bool = False) -> dict[str, Any]:
    """Compare two checkpoints of any format tensor by tensor, bit for bit. Raises DifferenceError with the report."""
    from transcoder.views import open_views

    started = time.monotonic()
    views = open_views(place(one), place(two), follow_links)
    report = {"source": str(one), "destination": str(two), "tensors": len(views[0].tensors), "differences": []}
    try:
        same(*views)
    except DifferenceError as error:
        error.report |= report | {"differences": error.report["differences"]}
        raise
    return report | {"seconds": round(time.monotonic() - started, 3)}


def same(one: View, two: View, only: set[str] | None = None) -> None:
    """Raise DifferenceError naming every tensor that differs; `only`: names of the first view that count."""
    from transcoder.views import compare

    differences = compare(one, two, only)
    if differences:
        problems = [Problem(tensor=row["tensor"], message=_difference(row)) for row in differences]
        error = DifferenceError(f"{len(differences)} tensors differ", kind="difference", problems=problems)
        error.report = {"differences": differences}
        raise error


def _difference(row: dict[str, Any]) -> str:
    if "reason" in row:
        return str(row["reason"])
    return f"{row['count']} elements differ, first at {row['first_index']}, by at most {row['max_abs']}"


def check(
    directory: PathLike,
    *,
    quick: bool = False,
    sample: float = 100.0,
    follow_links: bool = False,
    progress: Listener | None = None,
) -> dict[str, Any]:
    """Whether a checkpoint is whole. Raises DifferenceError listing the damage, InputError when it is none.

    quick: read no payloads. sample: percentage of payloads to read.
    """
    from transcoder.checking import check as examine

    started = time.monotonic()
    report = examine(place(directory), quick, sample, progress, follow_links)
    return report | {"seconds": round(time.monotonic() - started, 3)}


def inspect(
    directory: PathLike, *, html: PathLike | None = None, as_tree: bool = False, follow_links: bool = False
) -> dict[str, Any]:
    """What a checkpoint of any supported format holds, from headers alone. Raises InputError, OutputError.

    html: a file to write it to as a page that shows it. as_tree: whether `tree` of the report has the names as text.
    """
    from transcoder.inspection import inspect as look

    return look(place(directory), follow_links, Path(html) if html else None, as_tree)


def architectures() -> dict[str, Any]:
    """Every supported Hugging Face class, the model type that configs name it by, and what tests prove of it.

    The claims: names and shapes equal to what transformers writes; real megatron-core asks for and loads what we write;
    logits equal; quantised files decoded as another decoder does, and given back; files exported bit for bit.
    """
    from transcoder.recipes import registry

    record = json.loads(Path(__file__).with_name("proved.json").read_text())
    rows = [
        {"name": name, "model_type": recipe.hf[name], "recipe": recipe.name, "proved": record.get(name, UNPROVED)}
        for name, recipe in sorted(registry().items())
    ]
    return {"architectures": rows}


def open_checkpoint(path: PathLike) -> Any:
    """The catalog of a Hugging Face directory or a Megatron checkpoint: name → TensorSpec. Raises InputError."""
    from transcoder.formats.huggingface import is_hf, open_hf
    from transcoder.formats.opening import open_store
    from transcoder.iterations import find_iteration

    folder = place(path)
    return open_hf(folder).catalog if is_hf(folder) else open_store(find_iteration(folder)).catalog


def verify_import(plan: ImportPlan, out: Path) -> None:
    """Read what an import wrote into `out`, from the disk, and compare it with the source. Raises DifferenceError."""
    from transcoder.adapterplans import open_adapter
    from transcoder.disk import forget_pages
    from transcoder.megatron import open_megatron
    from transcoder.views import files_view, megatron_view, merged_view

    forget_pages(out)
    dtypes = {name: tensor.family.dtype(plan.dtype) for name, tensor in plan.model.hf.items()}
    source = merged_view(files_view(plan.source), plan.merge, plan.model, dtypes)
    shapes = {name: tensor.shape for name, tensor in plan.model.hf.items()}
    if plan.base is not None:
        written, *_ = open_adapter(out / plan.folder, plan.base, plan.architecture)
    else:
        written = open_megatron(out / plan.folder, None, plan.architecture, quantised=True, like=shapes)
    same(source, megatron_view(written), only=set(plan.model.hf))


def verify_export(plan: ExportPlan, out: Path) -> None:
    """Read what an export wrote into `out`, from the disk, and compare it with the source. Raises DifferenceError."""
    from transcoder.disk import forget_pages
    from transcoder.views import hf_view, megatron_view, merged_view

    forget_pages(out)
    dtypes = {name: spec.dtype for name, spec in plan.weights.catalog.items()}
    same(merged_view(megatron_view(plan.source), plan.merge, plan.source.model, dtypes), hf_view(out))


def verify_reshard(plan: ReshardPlan, out: Path) -> None:
    """Read what was written into `out`, from the disk, and compare it with the source. Raises DifferenceError."""
    from transcoder.disk import forget_pages
    from transcoder.megatron import open_megatron
    from transcoder.views import cast_view, megatron_view

    forget_pages(out)
    target = plan.target
    shapes = {name: tensor.shape for name, tensor in target.model.hf.items()}
    written = open_megatron(
        out / target.folder, plan.source.reference, target.architecture, quantised=True, like=shapes
    )
    dtypes = {name: tensor.family.dtype(target.dtype) for name, tensor in target.model.hf.items()}
    same(cast_view(megatron_view(plan.source), dtypes), megatron_view(written))
