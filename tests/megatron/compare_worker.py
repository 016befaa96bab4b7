"""Compares with every case on all ranks: `torchrun --nproc-per-node N .../compare_worker.py CASES.json`."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from transcoder.compare import compare
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import comparison, divergence, verdict
from transcoder.runtime.process import guarded, place
from transcoder.runtime.session import Chosen, Request, speaks
from transcoder.runtime.voice import Voice

Tensors = dict[str, torch.Tensor]
COUNT = 21  # tokens
EXCHANGED = {
    "gate and up": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "q and k": ("self_attn.q_proj.weight", "self_attn.k_proj.weight"),
    "experts": ("mlp.experts.0.down_proj.weight", "mlp.experts.1.down_proj.weight"),
    "gate and up of an expert": ("mlp.experts.2.gate_proj.weight", "mlp.experts.2.up_proj.weight"),
}


def exchanged(what: str, layer: int) -> Callable[[Tensors], None]:
    """A mistake that exchanges two tensors of a layer."""
    one, other = (f"model.layers.{layer}.{name}" for name in EXCHANGED[what])

    def alter(tensors: Tensors) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return alter


def replaced(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[Tensors], None]:
    """A mistake in one tensor."""

    def alter(tensors: Tensors) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return alter


def cases(
    model: Callable[[str], Path], mistakes: Mapping[str, tuple[str, Any, Any]], root: Path
) -> Callable[[str], dict[str, Any]]:
    """A function from a mistake, which is in the config or in the weights, or from a right model's kind, to a case."""

    @cache
    def make(name: str) -> dict[str, Any]:
        if name not in mistakes:
            return {"hf": str(model(name))}
        kind, wrong, _ = mistakes[name]
        if isinstance(wrong, dict):
            return {"hf": str(model(kind)), "config": wrong}
        return {"hf": str(model(kind)), "weights": str(mistaken(model(kind), root / name, wrong))}

    return make


def mistaken(source: Path, target: Path, alter: Callable[[Tensors], None]) -> Path:
    """A copy of a model whose weights are wrong."""
    shutil.copytree(source, target)
    files = {file: load_file(file) for file in target.glob("*.safetensors")}
    tensors = {name: tensor for found in files.values() for name, tensor in found.items()}
    alter(tensors)
    for file, found in files.items():
        save_file({name: tensors[name].contiguous() for name in found}, file, metadata={"format": "pt"})
    return target


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """What the speaking rank finds, on every rank: checks, first divergence, how many pairs."""
    folder = Path(case["hf"])
    config, dtype = read_config(folder), case.get("dtype", "float32")
    judged, watch = comparison.judged_type(config, dtype), comparison.Watch(logs=True)
    mesh = Mesh(*(case.get(name, 1) for name in ("tp", "pp", "ep", "etp")))
    comparison.enter(config, mesh, watch)
    ids = torch.randint(config["vocab_size"], (COUNT,), generator=torch.Generator().manual_seed(3)).tolist()
    request = Request("", tuple(ids))
    chosen = Chosen(folder, Path(case.get("weights", folder)), mesh, dtype, "cpu")
    theirs = comparison.run_reference(config, chosen, request, judged, watch, None) if speaks() else None
    modules = comparison.from_speaker(theirs.modules if theirs else None)
    ours = comparison.run_megatron(config | case.get("config", {}), chosen, request, judged, watch, modules)
    records = comparison.gathered(ours.records)
    return comparison.from_speaker(_found(theirs, ours, records, dtype, judged) if theirs else None)


def run_backward(case: dict[str, Any]) -> dict[str, Any]:
    """The gradients that both sides log, on every rank."""
    folder = Path(case["hf"])
    config, watch = read_config(folder), comparison.Watch(backward=True)
    mesh = Mesh(*(case.get(name, 1) for name in ("tp", "pp")))
    comparison.enter(config, mesh, watch)
    request, chosen = Request("", tuple(range(3, 3 + COUNT))), Chosen(folder, folder, mesh, "float32", "cpu")
    theirs = comparison.run_reference(config, chosen, request, "float32", watch, None) if speaks() else None
    modules = comparison.from_speaker(theirs.modules if theirs else None)
    ours = comparison.gathered(comparison.run_megatron(config, chosen, request, "float32", watch, modules).backward)
    return comparison.from_speaker({"hf": theirs.backward, "megatron": ours} if theirs else None)


def _found(theirs: Any, ours: Any, records: list[Any], dtype: str, judged: str) -> dict[str, Any]:
    near = verdict.measure(theirs.logits[dtype], ours.logits[dtype])
    checks = list(comparison.checks_of(theirs.logits, ours.logits, dtype, judged, near))
    compared = divergence.compare(theirs.records, records)
    first = divergence.first(compared)
    return {
        "good": all(check.holds for check in checks),
        "checks": [str(check) for check in checks],
        "largest": near.largest,
        "first": [first.reference, first.module, first.side] if first else None,
        "pairs": [[each.reference, each.module, each.side] for each in compared],
        "worst": max(each.error for each in compared),
    }


def main(path: str) -> int:
    """Run every case; the results go to PATH.out. The command of the last one, if it has one, is run as well."""
    torch.set_num_threads(1)
    cases = json.loads(Path(path).read_text())
    found = [run_backward(case) if case.get("backward") else run_case(case) for case in cases]
    if place().rank == 0:
        Path(f"{path}.out").write_text(json.dumps(found))
    command = cases[-1].get("command")
    return int(compare.main(command, standalone_mode=False)) if command else 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1]), Voice("compare", level="debug")))
