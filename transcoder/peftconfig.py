"""adapter_config.json of an adapter that Megatron trained: alpha from run_config.yaml, the rest from the shapes."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import Problem, refuse
from transcoder.formats.peft import LARGEST, PREFIX
from transcoder.lora import Adapted
from transcoder.lorabase import Base
from transcoder.megatron import Megatron
from transcoder.planner import Model
from transcoder.yamltext import read_yaml

A = ".lora_A.weight"


def emitted(source: Megatron, base: Base, adapted: Adapted) -> bytes:
    """The file, with the fields that PEFT asks for. Raises InputError where no file says alpha."""
    ranks = {
        name.removeprefix(PREFIX).removesuffix(A): tensor.family.sizes["rank"]
        for name, tensor in source.model.hf.items()
        if name.endswith(A)
    }
    usual = Counter(ranks.values()).most_common(1)[0][0]
    modules = [module for module in ranks if f"{module}.weight" in base.model.hf]
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.path),
        "inference_mode": True,
        "r": usual,
        "lora_alpha": _alpha(source.path),
        "lora_dropout": 0.0,
        "use_rslora": False,
        "use_dora": False,
        "bias": "none",
        "fan_in_fan_out": False,
        "modules_to_save": None,
        "target_modules": _short(modules, base.model),
        "target_parameters": sorted(set(_parameters(base.model, adapted))) or None,
        "rank_pattern": {re.escape(module): rank for module, rank in ranks.items() if rank != usual},
        "alpha_pattern": {},
    }
    return (json.dumps(fields, indent=2) + "\n").encode()


def _parameters(model: Model, adapted: Adapted) -> Iterator[str]:
    """Stacked experts, which are no modules, as `mlp.experts.down_proj`."""
    for number in adapted:
        for side in model.families[number].rule.hf:
            if len(side.layout.dims) == 3:
                yield side.name.rpartition("{l}.")[2]


def _short(modules: list[str], model: Model) -> list[str]:
    """The modules' last names, if these name no others; else their whole names."""
    lasts = {module.rpartition(".")[2] for module in modules}
    matrices = {name.removesuffix(".weight") for name, tensor in model.hf.items() if len(tensor.shape) == 2}
    wider = {module for module in matrices if module.rpartition(".")[2] in lasts}
    return sorted(lasts) if wider == set(modules) else sorted(modules)


def _alpha(folder: Path) -> float:
    path = folder / "run_config.yaml"
    table = read_yaml(path) if there(path) else None
    peft = table.get("peft") if isinstance(table, dict) else None
    alpha: Any = peft.get("alpha") if isinstance(peft, dict) else None
    if type(alpha) not in (int, float) or not 0 < alpha < LARGEST:
        hint = "add `peft: {alpha: …}` with the alpha that the adapter was trained with"
        problem = Problem(file=path.name, expected="peft.alpha, a positive number", found=f"{alpha!r:.80}", hint=hint)
        raise refuse("adapter", "no file says the adapter's alpha", [problem])
    found: float = alpha
    return found
