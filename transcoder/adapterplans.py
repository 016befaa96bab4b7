"""Adapters between PEFT's files and Megatron Bridge's keys: plans like those of whole models, run by the same code."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

from transcoder import manifest
from transcoder.atlas import Atlas
from transcoder.checks import check_coverage, check_hf, check_mcore
from transcoder.codecs import weights_of
from transcoder.dialects import dialect_of
from transcoder.disk import there
from transcoder.errors import Problem, UsageError, refuse
from transcoder.exportplan import ExportPlan, digests_of
from transcoder.formats.huggingface import open_hf, side_files
from transcoder.formats.opening import open_store, place
from transcoder.formats.peft import CONFIG, WEIGHTS, Peft, open_peft
from transcoder.formats.safetensors import Shard, emit_header, packed, shard_tensors
from transcoder.formats.store import Store
from transcoder.importing import ImportPlan, wanted_chunks
from transcoder.iterations import find_iteration, notes
from transcoder.lora import Adapted, adapted_by, adapted_in, module_of
from transcoder.lorabase import Base, base_of
from transcoder.lorarules import adapter_model
from transcoder.megatron import Megatron, check_files, one_dtype
from transcoder.mesh import Mesh
from transcoder.original import original_of
from transcoder.paths import map_file
from transcoder.peftconfig import emitted
from transcoder.planner import Model
from transcoder.spec import DTYPES, DType
from transcoder.updates import Update, bind, stacked

FORMS = ("canonical", "fused")
_KEYS = re.compile(rb"\.adapter\.(?:adapter_\w+\.)?linear_in\.weight")


@dataclass(frozen=True)
class Choices:
    """How an adapter is to be stored."""

    layout: str = ""
    dtype: str = ""
    form: str = "canonical"
    iteration: int | str = "both"
    files: str = "torch_dist"


def plan_adapter_import(
    src: Path, mesh: Mesh, hf_model: Path | None, arch: str, choices: Choices, divisor: int, follow_links: bool = False
) -> ImportPlan:
    """PEFT → Megatron. hf_model: the base model. Raises InputError listing what Megatron has no adapter for."""
    if choices.form not in FORMS:
        raise UsageError(f"--lora-form {choices.form}: give {' or '.join(FORMS)}", kind="layout")
    mesh.check_positive()
    adapter = open_peft(src, follow_links)
    base = base_of(_given(hf_model), arch, divisor=divisor * mesh.tp)
    other = stacked(base.model)
    if other is not None and not all(f"{module}.weight" in base.model.hf for module in adapter.parts):
        base = replace(base, model=other)
    updates = _updates(adapter, base.model)
    adapted = adapted_by(base.model, updates, choices.form == "canonical", mesh.tp)
    model = adapter_model(base.model, adapted, choices.layout)
    mesh.check(model.limits(), model.sizes["l"])
    source = open_hf(src, follow_links)
    stored = Counter(spec.dtype.name for spec in source.catalog.values()).most_common(1)[0][0]
    check_hf(model, source.catalog, DTYPES[stored], whole=False)
    target = DTYPES[choices.dtype or stored]
    placement = place(
        choices.files, [wanted_chunks(each, mesh, target) for each in model.mcore.values()], (), mesh.world
    )
    atlas = Atlas(placement.catalog)
    check_coverage(model, atlas)
    return ImportPlan(
        source,
        base.architecture,
        model,
        mesh,
        DTYPES[stored],
        target,
        model.sizes["vocab"] + model.sizes["pad"],
        placement,
        atlas,
        choices.iteration,
        (),
        (*source.warnings, *adapter.warnings, *_remarks(updates, mesh, model)),
        peft=_bridge_table(base.model, adapted, updates),
        base=base.path,
    )


def _given(hf_model: Path | None) -> Path:
    if hf_model is None:
        raise UsageError("an adapter says nothing of its model: give the base model with --hf-model DIR", kind="usage")
    return hf_model


def _updates(adapter: Peft, model: Model) -> dict[str, Update]:
    """What the adapter updates. Raises InputError for what Megatron's adapters do not hold."""
    if adapter.whole:
        hint = "--merge-adapter takes such adapters"
        problems = [Problem(file=WEIGHTS, tensor=name, expected="an update", hint=hint) for name in adapter.whole]
        raise refuse("adapter", "Megatron's adapters hold no whole weights", problems)
    updates = bind(adapter, model)
    alphas: dict[float, list[str]] = {}
    for name, update in updates.items():
        alphas.setdefault(round(update.scale * update.rank, 6), []).append(name)
    if len(alphas) > 1:
        problems = [Problem(tensor=names[0], found=f"alpha {alpha:g}") for alpha, names in sorted(alphas.items())]
        hint = "--merge-adapter takes such adapters"
        raise refuse("adapter", f"Megatron Bridge has one alpha for a whole adapter; {hint}", problems)
    return updates


def _remarks(updates: Mapping[str, Update], mesh: Mesh, model: Model) -> Iterator[str]:
    ranks = sorted({update.rank for update in updates.values()})
    if len(ranks) > 1:
        yield f"updates have ranks {ranks}: Megatron Bridge builds all adapters of one kind with one"
    if mesh.tp > 1 and any("linear_fc1.adapter.adapter_" in name for name in model.mcore):
        yield f"Megatron Bridge reads adapters of gate and up in this form at --tp {mesh.tp} only, as it writes them"


def _bridge_table(base: Model, adapted: Adapted, updates: Mapping[str, Update]) -> dict[str, Any]:
    """`peft` of run_config.yaml."""
    split = any(form.split for forms in adapted.values() for form in forms.values())
    update = next(iter(updates.values()))
    alpha = round(update.scale * update.rank, 6)
    return {
        "_target_": "megatron.bridge.peft." + ("canonical_lora.CanonicalLoRA" if split else "lora.LoRA"),
        "target_modules": list(dict.fromkeys(_targets(base, adapted))),
        "dim": Counter(each.rank for each in updates.values()).most_common(1)[0][0],
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "dropout": 0.0,
        "share_expert_adapters": False,
    }


def _targets(base: Model, adapted: Adapted) -> Iterator[str]:
    """Bridge's names of the modules, those of some layers only with their numbers."""
    names = {("linear_qkv", part): f"linear_{'qkv'[part]}" for part in range(3)}
    names |= {("linear_fc1", 0): "linear_fc1_gate", ("linear_fc1", 1): "linear_fc1_up"}
    for number, forms in adapted.items():
        module, every = module_of(base.families[number]), set(forms) in ({-1}, set(range(base.sizes["l"])))
        for layer, form in forms.items():
            for part in (part for part, rank in enumerate(form.ranks) if rank):
                name = names[module, part] if form.split else module
                yield name if every else f"*.layers.{layer}.*.{name}"


def is_adapter_checkpoint(path: Path) -> bool:
    """Whether a Megatron checkpoint holds an adapter, by the keys in its plan. Raises InputError for no checkpoint."""
    folder = find_iteration(path)
    if (folder / ".metadata").is_file():
        return _KEYS.search(map_file(folder / ".metadata")) is not None
    return any(_KEYS.search(entry.name.encode()) for entry in folder.iterdir())  # an array for each key


def open_adapter(
    path: Path, hf_model: Path | None, arch: str = "", expert_layout: str = ""
) -> tuple[Megatron, Base, Adapted]:
    """A Megatron adapter checkpoint bound to its base model, and what it updates. Raises InputError for a misfit."""
    folder = find_iteration(path)
    store = open_store(folder)
    store = replace(store, warnings=(*notes(path), *store.warnings))
    table = manifest.read(folder)
    check_files(folder, table, False)
    origin = original_of(None, table, {})
    layout = expert_layout or str((table or {}).get("variants", {}).get("experts", ""))
    base = base_of(_given(hf_model), arch, dialect=dialect_of(store.tensors), expert_layout=layout, pad=_rows(store))
    adapted = adapted_in(base.model, store.tensors, origin.shapes)
    model = adapter_model(base.model, adapted, base.model.dialect) if adapted else replace(base.model, families=())
    check_mcore(model, store.catalog)
    atlas = Atlas(store.catalog)
    check_coverage(model, atlas)
    reference = folder / "hf" if there(folder / "hf" / CONFIG) else None
    usual = one_dtype(model, store)
    found = Megatron(
        folder, store, model, atlas, usual, base.architecture, reference, base.config, None, origin, {}, table
    )
    return found, base, adapted


def _rows(store: Store) -> int:
    """Rows of the head, padding included, where it has an adapter."""
    found = store.tensors.get("output_layer.adapter.linear_out.weight")
    return found[1][0] if found else 0


def plan_adapter_export(src: Path, hf_model: Path | None, arch: str, dtype: str, expert_layout: str) -> ExportPlan:
    """Megatron → PEFT. hf_model: the base model. Raises InputError for what does not fit it."""
    source, base, adapted = open_adapter(src, hf_model, arch, expert_layout)
    target = DTYPES[dtype] if dtype else source.dtype
    shapes = {name: (target, tensor.shape) for name, tensor in source.model.hf.items()}
    known = {spec.name: (spec.dtype, spec.shape) for shard in source.origin.shards for spec in shard.tensors}
    same = known == shapes and len(source.origin.shards) == 1
    shard = source.origin.shards[0] if same else _shard(shapes)
    weights = weights_of({spec.name: spec for spec in shard.tensors}, {})
    made: dict[str, bytes] = {}
    names, warnings = side_files(source.reference, set()) if source.reference else ((), ())
    if source.reference is None or known.keys() != shapes.keys():
        names = tuple(name for name in names if name != CONFIG)
        made[CONFIG] = emitted(source, base, adapted)
    return ExportPlan(
        source, (shard,), None, names, target, dict(digests_of(source)), weights, {}, tuple(warnings), made=made
    )


def _shard(tensors: Mapping[str, tuple[DType, tuple[int, ...]]]) -> Shard:
    header = emit_header([(name, dtype, shape) for name, (dtype, shape) in sorted(tensors.items())], {"format": "pt"})
    size = len(header) + sum(dtype.size * prod(shape) for dtype, shape in tensors.values())
    return Shard(WEIGHTS, size, packed(header), shard_tensors(WEIGHTS, header, size))
