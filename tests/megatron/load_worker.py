"""Fills live models: `torchrun --nproc-per-node N tests/megatron/load_worker.py CASES.json`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import torch
import torch.distributed as dist
import worker
from models import read_config

from transcoder import engine
from transcoder.mesh import Mesh
from transcoder.runtime import filling
from transcoder.runtime.load import load
from transcoder.runtime.model import build_model
from transcoder.runtime.specs import local_layers

NAN = float("nan")


def tensors(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and persistent buffers of floating point."""
    found = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: found[name] for name in model.state_dict() if name in found and found[name].is_floating_point()}


@torch.no_grad()
def spoil(model: Any) -> None:
    """NaN everywhere."""
    for tensor in tensors(model).values():
        tensor.fill_(NAN)


def bits(model: Any) -> dict[str, torch.Tensor]:
    """A copy of everything, as bytes."""
    return {name: tensor.detach().contiguous().view(torch.uint8).clone() for name, tensor in tensors(model).items()}


def differing(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> list[str]:
    """Names of tensors that differ in any bit."""
    assert one.keys() == two.keys() and one
    return [name for name in one if not torch.equal(one[name], two[name])]


class Wrapped(torch.nn.Module):
    """What training puts around a model."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module

    def sharded_state_dict(self, **options: Any) -> Any:
        return self.module.sharded_state_dict(**options)


def run_ours(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """Load from the Hugging Face files, then from the checkpoint; both equal the oracle and megatron's own loading."""
    model, oracle = worker.build(case)
    out["parameters"] = len(list(model.parameters()))
    failures: list[str] = []
    loaded = []
    for source in ("hf", "ckpt"):
        spoil(model)
        report = load([Wrapped(model)] if source == "ckpt" else model, case[source], case["hf"])
        assert report["parameters"] == sum(tensor.numel() for tensor in tensors(model).values()), report
        zeros = sum(int((tensor == 0).sum()) for tensor in tensors(model).values())  # no element of the files is zero
        read = report["parameters"] - (zeros if source == "hf" else 0)  # padding and missing biases are in no file
        assert report["bytes_read"] == 4 * read, (source, report)
        failures += [f"{source}: {text}" for text in worker.compare(model, oracle)]
        loaded.append(bits(model))
    failures += differing(*loaded)
    if case["stock"]:
        worker.load(model, case)
        failures += [f"megatron has another {name}" for name in differing(loaded[0], bits(model))]
    return failures


def listed_layers(config: Any) -> Any:
    """The local layers of a model whose layers are alike, and which says so with a list: it asks for single layers."""
    config.moe_layer_freq = [1] * config.num_layers
    return local_layers(config)


def biased_layers(config: Any) -> Any:
    """The local layers of a model whose router has a bias for the choice of experts."""
    config.moe_router_score_function, config.moe_router_enable_expert_bias = "sigmoid", True
    config.moe_router_pre_softmax = False
    return local_layers(config)


@torch.no_grad()
def run_saved(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """What megatron saves of a model with an expert bias comes back through our loader, buffers too."""
    mesh = Mesh(case["tp"], case["pp"], case["ep"], case["etp"])
    model = build_model(read_config(case["hf"]), mesh, "bfloat16", biased_layers)
    for number, (name, tensor) in enumerate(tensors(model).items()):
        place = dist.get_rank() if ".experts." in name else worker.mpu.get_pipeline_model_parallel_rank()
        tensor.normal_(generator=torch.Generator().manual_seed(1000 * place + number))
    metadata = worker.DIALECTS[case["dialect"]]
    state = {"checkpoint_version": 3.0, "iteration": 0, "model": model.sharded_state_dict(metadata=dict(metadata))}
    Path(case["ckpt"]).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    worker.dist_checkpointing.save(state, case["ckpt"], content_metadata=metadata)
    dist.barrier()
    saved = bits(model)
    assert sum("expert_bias" in name for name in saved) == model.config.num_layers // case["pp"]
    spoil(model)
    load(model, case["ckpt"], case["hf"], verify=True)
    out["parameters"] = len(saved)
    return differing(saved, bits(model))


worker.SPECS |= {"listed": listed_layers}
worker.ACTIONS |= {"ours": run_ours, "saved": run_saved}

if __name__ == "__main__":
    engine.BAND = filling.BAND = 2100  # so that even tiny tensors take several reads
    filling.ROW = 1  # so that exactly this rank's bytes are read
    sys.exit(worker.main(sys.argv[1]))
