"""What the operations tell: plain values for `--json`, counts as Megatron prints them, sizes as people write them."""

from __future__ import annotations

import re
import resource
import sys
import time
from collections.abc import Iterable
from math import prod
from typing import TYPE_CHECKING, Any

from transcoder.errors import UsageError
from transcoder.formats.store import Store
from transcoder.planner import Model
from transcoder.spec import box_shape

if TYPE_CHECKING:
    from transcoder.exportplan import ExportPlan
    from transcoder.importing import ImportPlan
    from transcoder.resharding import ReshardPlan

UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12, "KI": 2**10, "MI": 2**20, "GI": 2**30, "TI": 2**40}


def size_of(text: str | int) -> int:
    """Bytes of a size: `64MiB`, `5GB`, `1000`. Raises UsageError.

    >>> size_of("64MiB"), size_of("5GB"), size_of("512")
    (67108864, 5000000000, 512)
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?I?)B?", str(text).strip().upper())
    if match is None or match[2] not in UNITS:
        raise UsageError(f"{text!r} is not a size; write 64MiB or 5GB", kind="size")
    return int(float(match[1]) * UNITS[match[2]])


def elements(shapes: Iterable[tuple[int, ...]]) -> int:
    """Elements of all shapes together."""
    return sum(prod(shape) for shape in shapes)


def about(model: Model, source: object, destination: object | None, architecture: str) -> dict[str, Any]:
    """The fields that every converting command reports."""
    return {
        "source": str(source),
        "destination": None if destination is None else str(destination),
        "architecture": architecture,
        "tensors": len(model.hf),
        "megatron_parameters": sum(family.parameters for family in model.families),
        "parameters": elements(tensor.shape for tensor in model.hf.values()),
    }


def costs(started: float, read: int, written: int) -> dict[str, Any]:
    """Bytes moved, seconds since `started` (monotonic), and the process's largest resident memory in bytes."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    seconds = round(time.monotonic() - started, 3)
    return {"bytes_read": read, "bytes_written": written, "seconds": seconds, "peak_memory": peak}


def import_report(plan: ImportPlan, dst: object) -> dict[str, Any]:
    """What an import does, but for its costs."""
    mesh = plan.mesh
    return about(plan.model, plan.source.path, dst, plan.architecture) | {
        "warnings": list(plan.warnings),
        "weights_only": plan.model.weights_only(),
        "iteration": plan.step,
        "folder": plan.folder,
        "format": plan.placement.form,
        "dtype": plan.dtype.name,
        "megatron_flags": megatron_flags(plan),
        "parallel": {"tp": mesh.tp, "pp": mesh.pp, "ep": mesh.ep, "etp": mesh.etp},
        "rank_parameters": rank_parameters(plan),
    }


def megatron_flags(plan: ImportPlan) -> list[str]:
    """Megatron-LM's options that `--use-checkpoint-args` does not take from the checkpoint."""
    fields = plan.model.fields()
    return [f"--norm-epsilon {fields['layernorm_epsilon']}", *(["--qk-layernorm"] if fields["qk_layernorm"] else [])]


def reshard_report(plan: ReshardPlan, src: object, dst: object, warnings: list[str]) -> dict[str, Any]:
    """What Megatron → Megatron does, but for its costs."""
    report = import_report(plan.target, dst)
    layout = plan.target.model.dialect
    known = {"source": str(src), "layout": layout, "left_out": left_out(plan.source.store)}
    return report | known | {"warnings": [*report["warnings"], *warnings]}


def export_report(plan: ExportPlan, dst: object, warnings: list[str]) -> dict[str, Any]:
    """What an export does, but for its costs."""
    source = plan.source
    return about(source.model, source.path, dst, source.architecture) | {
        "warnings": [*source.store.warnings, *warnings, *source.store.left_out()],
        "dtype": plan.dtype.name,
        "left_out": left_out(source.store),
    }


def left_out(store: Store) -> list[dict[str, Any]]:
    """What of a checkpoint is not read, by the prefix of its keys."""
    rows = sorted(store.ignored.items())
    return [{"prefix": prefix, "keys": each.keys, "bytes": each.nbytes} for prefix, each in rows]


def rank_parameters(plan: ImportPlan) -> list[dict[str, int]]:
    """Parameters on every (tensor, pipeline) rank, vocabulary padding included, as Megatron's model build counts."""
    from transcoder.importing import wanted_chunks

    sharded = {name: _is_sharded(plan, name) for name in plan.model.mcore}
    width = plan.mesh.stage_ranks
    own: dict[int, int] = {}
    shared: dict[int, int] = {}
    for name, tensor in plan.model.mcore.items():
        for box, owner, _ in wanted_chunks(tensor, plan.mesh, plan.dtype).chunks:
            counts, place = (own, owner) if sharded[name] else (shared, owner // width)
            counts[place] = counts.get(place, 0) + prod(box_shape(box))
    return [
        {"tp": rank, "pp": stage, "parameters": own.get(stage * width + rank, 0) + shared.get(stage, 0)}
        for stage in range(plan.mesh.pp)
        for rank in range(plan.mesh.tp)
    ]


def _is_sharded(plan: ImportPlan, name: str) -> bool:
    tensor = plan.model.mcore[name]
    return bool(tensor.family.mcore[tensor.part].layout.meshes - {"each"})
