"""Runs cases with the real megatron-core: `torchrun --nproc-per-node N tests/megatron/worker.py CASES.json`."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
import time
import traceback
import warnings
from datetime import timedelta
from functools import lru_cache
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

torch.set_num_threads(1)

from transcoder.mesh import Mesh  # noqa: E402, I001
from transcoder.runtime.model import build_model, mpu, stage_forward  # noqa: E402
from megatron.core import dist_checkpointing, model_parallel_config  # noqa: E402
from megatron.core.dist_checkpointing.strategies import filesystem_async  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from models import read_config  # noqa: E402
from oracle import Oracle, Place, parameters  # noqa: E402
from standins import te_grouped_layers, te_layers  # noqa: E402

# Without psutil megatron's writer processes die on a memory log line and save() waits for ever.
if importlib.util.find_spec("psutil") is None:
    filesystem_async._process_memory = lambda: 0

# 0.15.3 warns of experts over tensor-parallel ranks through a module that it forgot to import.
model_parallel_config.warnings = warnings

PATIENCE = timedelta(seconds=60)
DIALECTS: dict[str, dict[str, Any]] = {
    "stacked": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    "per-layer": {"non_homogeneous_layers": True},
    "singleton": {"singleton_local_shards": True},
}


SPECS: dict[str, Any] = {"local": "local", "te": te_layers, "te-grouped": te_grouped_layers}


def build(case: dict[str, Any]) -> tuple[Any, Oracle]:
    """The model of a case at its grid, and what this rank of it must hold."""
    config = read_config(case["hf"])
    mesh = Mesh(case["tp"], case["pp"], case.get("ep", 1), case.get("etp", 1))
    model = build_model(config, mesh, case.get("dtype", "float32"), SPECS[case.get("spec", "local")])
    return model, Oracle(case["hf"], config, place())


def place() -> Place:
    """Where this rank is."""
    return Place(
        tp=(mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
        ep=(mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()),
        etp=(mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()),
    )


def compare(model: Any, oracle: Oracle) -> list[str]:
    """Every parameter of this rank that differs from the oracle in any bit."""
    wrong = []
    for name, layer, parameter in parameters(model):
        want = oracle.expected(name, layer).to(parameter.dtype)
        same = want.shape == parameter.shape and torch.equal(
            want.contiguous().view(torch.uint8), parameter.detach().contiguous().view(torch.uint8)
        )
        if not same:
            wrong.append(f"layer {layer} {name} {tuple(parameter.shape)} differs from {tuple(want.shape)}")
    return wrong


@torch.no_grad()
def fill(model: Any, oracle: Oracle) -> None:
    """Set this rank's parameters from the HF files."""
    for name, layer, parameter in parameters(model):
        parameter.copy_(oracle.expected(name, layer))


@torch.no_grad()
def load(model: Any, case: dict[str, Any]) -> None:
    """Fill with NaN, then load with megatron's own loader, strictly."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))
    metadata = dict(dist_checkpointing.load_content_metadata(case["ckpt"]) or {})
    wanted = {"model": model.sharded_state_dict(metadata=metadata)}
    strict = StrictHandling(case.get("strict", "raise_unexpected"))
    loaded = dist_checkpointing.load(wanted, case["ckpt"], strict=strict)
    model.load_state_dict(loaded["model"], strict=True)


@lru_cache
def reference_logits(directory: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and the float32 logits of transformers at every position."""
    from transformers import AutoModelForCausalLM

    vocab = read_config(directory)["vocab_size"]
    tokens = torch.randint(vocab, (2, 17), generator=torch.Generator().manual_seed(1))
    options = {"dtype": torch.float32, "experts_implementation": "eager"}  # grouped matmul wants multiples of 16 bytes
    model = AutoModelForCausalLM.from_pretrained(directory, **options).eval()
    with torch.no_grad():
        return tokens, model(tokens).logits


def measure_logits(model: Any, case: dict[str, Any], out: dict[str, Any]) -> None:
    """Note the largest difference at any position, and the bound, on the first rank of the last stage."""
    tokens, want = reference_logits(case["hf"])
    logits = stage_forward(model, tokens)
    if logits is None or mpu.get_tensor_model_parallel_rank() or mpu.get_data_parallel_rank():
        return
    assert logits.shape == want.shape and logits.dtype == want.dtype == torch.float32
    std = float(want.std())
    exact = case["tp"] == 1 and model.config.num_moe_experts is None  # experts add up in another order
    bound = (1e-5 if exact else 1e-4) * std
    out.update(max_abs=float((logits - want).abs().max()), std=std, bound=bound)


def check_logits(out: dict[str, Any]) -> list[str]:
    """A failure when the difference noted on this rank is above the bound, or not a number."""
    if "max_abs" not in out or out["max_abs"] <= out["bound"]:
        return []
    return ["logits differ by {max_abs:.3g}, bound {bound:.3g} (std {std:.3g})".format(**out)]


NOT_OF_THE_MODEL = ("tensor_model_parallel_size", "pipeline_model_parallel_size", "moe_router_load_balancing_type",
                    "moe_aux_loss_coeff", "moe_token_dispatcher_type", "moe_grouped_gemm")  # fmt: skip


def check_arguments(config: Any, case: dict[str, Any]) -> list[str]:
    """Fields of the model that matched the logits, where `args` of the checkpoint say otherwise."""
    stored = vars(dist_checkpointing.load_common_state_dict(case["ckpt"])["args"])
    stored["num_moe_experts"] = stored.get("num_experts")
    names = [name for name in stored if name not in NOT_OF_THE_MODEL and hasattr(config, name)]
    assert len(names) > 10, names
    different = [name for name in names if stored[name] != getattr(config, name)]
    return [f"args.{name} is {stored[name]!r}, the model has {getattr(config, name)!r}" for name in different]


def run_load(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """Load, compare parameters; compare logits in float32."""
    model, oracle = build(case)
    load(model, case)
    out["parameters"] = len(list(model.parameters()))
    if case.get("logits", case.get("dtype", "float32") == "float32"):
        measure_logits(model, case, out)
    return compare(model, oracle) + check_logits(out) + check_arguments(model.config, case)


def run_measure(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """Load, then report how wrong parameters and logits are instead of failing."""
    model, oracle = build(case)
    load(model, case)
    measure_logits(model, case, out)
    out.update(parameters=len(list(model.parameters())), differing=compare(model, oracle))
    return []


def run_save(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """Fill from the HF files and save with megatron's own writer."""
    model, oracle = build(case)
    fill(model, oracle)
    metadata = DIALECTS[case.get("dialect", "stacked")]
    state = {"checkpoint_version": 3.0, "iteration": 0, "model": model.sharded_state_dict(metadata=dict(metadata))}
    Path(case["ckpt"]).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    backend = (case.get("format", "torch_dist"), 1)
    dist_checkpointing.save(state, case["ckpt"], sharded_strategy=backend, content_metadata=metadata)
    dist.barrier()
    out["parameters"] = len(list(model.parameters()))
    return []


ACTIONS = {"load": run_load, "measure": run_measure, "save": run_save}


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """One case on this rank; an exception becomes a failure."""
    out: dict[str, Any] = {}
    try:
        failures = ACTIONS[case["action"]](case, out)
    except Exception:
        failures = [traceback.format_exc()]
        print(failures[0], file=sys.stderr, flush=True)  # the other ranks may wait for this one in vain
    return {"failures": [f"rank {dist.get_rank()}: {text}" for text in failures], **out}


def gather(result: dict[str, Any]) -> dict[str, Any]:
    """The results of all ranks as one."""
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, result)
    merged = {key: value for part in parts for key, value in part.items()}
    failures = [text for part in parts for text in part["failures"]]
    counts = [part.get("parameters", 0) for part in parts]
    return merged | {"failures": failures, "parameters": counts, "ok": not failures}


def main(path: str) -> int:
    """Run every case; results go to PATH.out as JSON lines."""
    logging.disable(logging.WARNING)
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=PATIENCE)
    good = True
    with Path(f"{path}.out").open("w") if dist.get_rank() == 0 else Path("/dev/null").open("w") as sink:
        for case in json.loads(Path(path).read_text()):
            begin = time.monotonic()
            result = gather(run_case(case))
            good = good and result["ok"]
            sink.write(json.dumps({"case": case, **result, "seconds": round(time.monotonic() - begin, 2)}) + "\n")
            sink.flush()
    dist.barrier()
    dist.destroy_process_group()
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
