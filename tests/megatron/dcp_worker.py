"""Saves Hugging Face tensors as trainers with FSDP do, cut along rows: `torchrun … dcp_worker.py CASES`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor


def main(path: str) -> None:
    """Every case: the tensors of a folder, under a prefix, with an optimizer's moments beside them."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for case in json.loads(Path(path).read_text()):
        tensors = {}
        for file in sorted(Path(case["hf"]).glob("*.safetensors")):
            tensors |= load_file(file)
        state = {case["prefix"] + name: distribute_tensor(value, mesh, [Shard(0)]) for name, value in tensors.items()}
        moments = {f"optim.state.{name}.exp_avg": value for name, value in list(state.items())[:2]}
        dcp.save({**state, **moments, "train_state": {"step": torch.tensor(3)}}, checkpoint_id=case["out"])
        if dist.get_rank() == 0:
            with Path(f"{path}.out").open("a") as file:
                file.write(json.dumps({"case": case["out"], "ok": True, "failures": []}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
