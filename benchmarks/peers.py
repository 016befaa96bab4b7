"""One conversion by another program, in the process that compare_peers.py starts: KIND SOURCE TARGET.

load-save             safetensors' load_file and save_file, shard by shard: no conversion
dcp-save              load_file of all shards, then torch.distributed.checkpoint.save: the floor of every saver
mbridge-import        mbridge onto a model, then megatron-core's save
bridge-import         Megatron-Bridge's import_ckpt
bridge-export         Megatron-Bridge's export_ckpt; SOURCE:MODEL, the checkpoint and the Hugging Face folder
"""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any


def shards(source: str) -> list[Path]:
    """The safetensors files of a folder."""
    return sorted(Path(source).glob("*.safetensors"))


def load_save(source: str, target: str) -> None:
    """Each shard, there and back to disk."""
    from safetensors.torch import load_file, save_file

    Path(target).mkdir()
    for shard in shards(source):
        save_file(load_file(shard), Path(target, shard.name))


def dcp_save(source: str, target: str) -> None:
    """Everything in one state dict, in one process."""
    import torch.distributed.checkpoint as dcp
    from safetensors.torch import load_file

    state: dict[str, Any] = {}
    for shard in shards(source):
        state.update(load_file(shard))
    dcp.save(state, checkpoint_id=target)


def alone(started: bool = True) -> None:
    """A process group of one rank, on gloo, over the loopback interface; started: not left to the peer to start."""
    import stand_in
    import torch

    stand_in.install()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        RANK="0",
        WORLD_SIZE="1",
        LOCAL_RANK="0",
        GLOO_SOCKET_IFNAME="lo",
    )
    if started:
        torch.distributed.init_process_group("gloo", rank=0, world_size=1)


def parallel() -> None:
    """megatron-core's groups and seeds."""
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(0)


def mbridge_import(source: str, target: str) -> None:
    """Build a model, fill it, save it with megatron-core."""
    alone()
    parallel()
    from mbridge import AutoBridge
    from megatron.core import dist_checkpointing

    bridge = AutoBridge.from_pretrained(source)
    bridge.set_extra_args(use_cpu_initialization=True, gradient_accumulation_fusion=False, masked_softmax_fusion=False)
    models = bridge.get_model(use_cpu_initialization=True)
    bridge.load_weights(models, source)
    Path(target).mkdir()
    dist_checkpointing.save(models[0].sharded_state_dict(), target)


def bridge_import(source: str, target: str) -> None:
    """As `scripts/conversion` does it."""
    alone()
    import torch
    from megatron.bridge import AutoBridge

    AutoBridge.import_ckpt(hf_model_id=source, megatron_path=target, torch_dtype=torch.bfloat16)


def bridge_export(source: str, target: str) -> None:
    """As `scripts/conversion` does it."""
    alone(started=False)
    from megatron.bridge import AutoBridge

    checkpoint, model = source.split(":")
    AutoBridge.from_hf_pretrained(model).export_ckpt(checkpoint, target, show_progress=False)


KINDS = {
    "load-save": load_save,
    "dcp-save": dcp_save,
    "mbridge-import": mbridge_import,
    "bridge-import": bridge_import,
    "bridge-export": bridge_export,
}


if __name__ == "__main__":
    KINDS[sys.argv[1]](*sys.argv[2:])
