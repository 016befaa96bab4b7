"""What megatron-core needs from the host: a CUDA shim on CPU, and process groups."""

from __future__ import annotations

import os
from typing import Any

import torch
import torch.distributed as dist

from transcoder.mesh import Mesh


def install_cuda_shim() -> bool:
    """Answer megatron's questions for a CUDA device with the CPU; true when it was needed."""
    if torch.cuda.is_available():
        return False
    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_args, **_kwargs: None
    return True


def _init_world() -> None:
    """Join the world of torchrun, or make a world of one."""
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if "RANK" in os.environ and "WORLD_SIZE" in os.environ:
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)


def _is_ready(mpu: Any, mesh: Mesh) -> bool:
    """Whether the model-parallel groups already have this grid."""
    if not mpu.model_parallel_is_initialized():
        return False
    dense = mpu.get_tensor_model_parallel_world_size(), mpu.get_pipeline_model_parallel_world_size()
    experts = mpu.get_expert_model_parallel_world_size(), mpu.get_expert_tensor_parallel_world_size()
    return bool((*dense, *experts) == (mesh.tp, mesh.pp, mesh.ep, mesh.etp))


def init_parallel(mesh: Mesh) -> None:
    """Make the process groups of a grid, replacing those of another grid."""
    install_cuda_shim()
    from megatron.core import parallel_state as mpu

    if not dist.is_initialized():
        _init_world()
    if _is_ready(mpu, mesh):
        return
    if mpu.model_parallel_is_initialized():
        mpu.destroy_model_parallel()
    experts = {"expert_model_parallel_size": mesh.ep, "expert_tensor_parallel_size": mesh.etp}
    mpu.initialize_model_parallel(mesh.tp, mesh.pp, **experts)


def shutdown() -> None:
    """Give every process group back."""
    from megatron.core import parallel_state as mpu

    if dist.is_initialized():
        mpu.destroy_model_parallel()
        dist.destroy_process_group()
