"""What a plan would do, from its integers alone: per rule source → target, cuts and bytes; files; memory."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING, Any

from transcoder.importing import ImportPlan
from transcoder.planner import Family, Model
from transcoder.reports import export_report, import_report
from transcoder.spec import Catalog, DType

if TYPE_CHECKING:
    from transcoder.exportplan import ExportPlan

OVERHEAD = 96 << 20  # bytes: Python, NumPy and the plan


@dataclass(frozen=True)
class Plan:
    """A conversion that was decided and proved, and not begun."""

    direction: str  # "hf2mcore" or "mcore2hf"
    work: ImportPlan | ExportPlan
    memory: int  # bytes of buffers

    @cached_property
    def table(self) -> dict[str, Any]:
        """The plan as plain values: rules, files, and a bound for the process's anonymous memory in bytes."""
        rules = [_rule(family, self) for family in self.model.families]
        return {"rules": rules, "files": list(_files(self.work)), "memory": self.memory + OVERHEAD}

    @property
    def model(self) -> Model:
        """The model that is converted."""
        return self.work.model if isinstance(self.work, ImportPlan) else self.work.source.model

    @property
    def catalog(self) -> Catalog:
        """The Megatron side: every stored tensor with its chunks."""
        return self.work.placement.catalog if isinstance(self.work, ImportPlan) else self.work.source.store.catalog

    def dtype_of(self, name: str, side: str) -> DType:
        """The dtype of a weight at the source or the target, decoded."""
        tensor = self.model.hf[name]
        if isinstance(self.work, ImportPlan):
            stored = self.work.source.weights.catalog[name].dtype
            return stored if side == "source" else tensor.family.dtype(self.work.dtype)
        return self.work.source.stored(tensor) if side == "source" else self.work.weights.catalog[name].dtype

    @property
    def report(self) -> dict[str, Any]:
        """The report of `transcode plan`; `text` is what `describe` says."""
        work = self.work
        facts = import_report(work, None) if isinstance(work, ImportPlan) else export_report(work, None, [])
        return {**facts, "direction": self.direction, "plan": self.table, "text": self.describe()}

    def describe(self) -> str:
        """The plan as text, one paragraph per rule."""
        return "\n".join(_lines(self))


def _rule(family: Family, plan: Plan) -> dict[str, Any]:
    count = family.parameters
    target = plan.work.dtype
    hf = [f"{side.name} {list(side.layout.shape(family.sizes))}" for side in family.rule.hf]
    mcore = [f"{side.name} {list(side.layout.shape(family.sizes))}" for side in family.mcore]
    hf_sides = [(prod(side.layout.shape(family.sizes)), side) for side in family.rule.hf]
    elements = sum(size for size, side in hf_sides for _ in family.instances(side))
    forwards = isinstance(plan.work, ImportPlan)
    return {
        "rule": " = ".join([family.rule.label, *(f"{side.name} {side.layout.text}" for side in family.rule.hf)]),
        "source": hf if forwards else mcore,
        "target": mcore if forwards else hf,
        "count": count,
        "bytes": elements * family.dtype(target).size,
        "cuts": [_cuts(plan.catalog, side.named(next(family.instances(side)))) for side in family.mcore],
        "codec": _codec(family, plan),
    }


def _codec(family: Family, plan: Plan) -> str:
    """What happens to the values of a rule, besides being moved."""
    forwards, names = (
        isinstance(plan.work, ImportPlan),
        [s.named(i) for s in family.rule.hf for i in family.instances(s)],
    )
    weights = plan.work.source.weights if isinstance(plan.work, ImportPlan) else plan.work.weights
    codecs = sorted({weights.codecs[name].name for name in names if name in weights.codecs})
    steps = [f"{'decode' if forwards else 'encode'} {name}" for name in codecs]
    one, two = ({plan.dtype_of(name, side).name for name in names} for side in ("source", "target"))
    steps += [f"cast {' and '.join(sorted(one))} to {' and '.join(sorted(two))}"] if one != two else []
    steps += [f"add {family.rule.plus if forwards else -family.rule.plus}"] if family.rule.plus else []
    steps += ["compare with the tensor that it repeats"] if family.rule.alias and forwards else []
    return ", ".join(steps) or "copy"


def _cuts(catalog: Catalog, key: str) -> list[int]:
    """Chunks per dimension."""
    boxes = [chunk.box for chunk in catalog[key].chunks]
    return [len(set(intervals)) for intervals in zip(*boxes, strict=True)]


def _files(work: ImportPlan | ExportPlan) -> Iterator[dict[str, Any]]:
    if isinstance(work, ImportPlan):
        for name, size in work.placement.sizes.items():
            yield {"name": f"{work.folder}/{name}", "bytes": size}
    else:
        for shard in work.shards:
            yield {"name": shard.name, "bytes": shard.size}


def _lines(plan: Plan) -> Iterator[str]:
    table = plan.table
    for row in table["rules"]:
        yield from _paragraph(row)
    yield f"files: {len(table['files'])}"
    for file in table["files"]:
        yield f"  {file['bytes']:>16,} bytes  {file['name']}"
    total = sum(file["bytes"] for file in table["files"])
    yield f"  {total:>16,} bytes in all; peak memory at most {table['memory'] >> 20} MiB"
    yield "every source element is read and every target element is written exactly once"


def _paragraph(row: Mapping[str, Any]) -> Iterator[str]:
    yield f"{' + '.join(row['source'] or ['zeros'])} → {' + '.join(row['target'])}"
    cuts = ", ".join("×".join(map(str, cut)) for cut in row["cuts"])
    yield f"    {row['rule']}"
    yield f"    × {row['count']}: {row['bytes']:,} bytes, chunk grid {cuts}, {row['codec']}"
