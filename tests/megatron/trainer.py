"""Trains tiny models with megatron-core's distributed optimizer on CPU and saves them: `torchrun … trainer.py CASES`.

No code of the converter is imported. Megatron's optimizer asks for CUDA tensors by name: `OnCpu` answers for the CPU.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

torch.set_num_threads(1)
torch.cuda.current_device = lambda: torch.device("cpu")
torch.cuda.synchronize = torch.cuda.empty_cache = lambda *_args, **_kwargs: None

from megatron.core import dist_checkpointing, tensor_parallel  # noqa: E402
from megatron.core import parallel_state as mpu  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject  # noqa: E402
from megatron.core.distributed import (  # noqa: E402
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.models.gpt import GPTModel  # noqa: E402
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec, get_gpt_mtp_block_spec  # noqa: E402
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer  # noqa: E402
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler  # noqa: E402
from megatron.core.pipeline_parallel import get_forward_backward_func  # noqa: E402
from megatron.core.transformer.moe import moe_utils  # noqa: E402
from megatron.core.transformer.transformer_config import TransformerConfig  # noqa: E402
from oracle import parameters  # noqa: E402

moe_utils.te_general_gemm = None  # 0.16.1 leaves the name undefined where there is no Transformer Engine
BATCH, LENGTH = 2, 16


class OnCpu(TorchFunctionMode):
    """Makes tensors for CUDA on the CPU, and gives the CPU's types the names of CUDA's."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device", "")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        found = func(*args, **kwargs)
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return found.replace("torch.", "torch.cuda.")
        return found


def grid(case: dict[str, Any]) -> tuple[Any, ...]:
    """tp, pp, virtual stages, ep and etp."""
    return case["tp"], case["pp"], case.get("vpp"), case.get("ep", 1), case.get("etp", case["tp"])


def start(case: dict[str, Any], before: dict[str, Any] | None) -> None:
    """The process groups of a case, if the one before had others, and its random numbers."""
    if before is None or grid(case) != grid(before):
        mpu.destroy_model_parallel()
        tp, pp, virtual, ep, etp = grid(case)
        mpu.initialize_model_parallel(
            tp,
            pp,
            virtual_pipeline_model_parallel_size=virtual,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
    torch.manual_seed(7 + mpu.get_pipeline_model_parallel_rank())  # whole tensors are made on every rank, then cut
    tensor_parallel.random._CUDA_RNG_STATE_TRACKER = Forked()
    tensor_parallel.random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True


class Forked:
    """The tracker of random numbers per device, which there is only one of."""

    def fork(self, *_args: Any) -> Any:
        return torch.random.fork_rng(devices=[])

    def is_initialized(self) -> bool:
        return True

    def get_states(self) -> dict[str, torch.Tensor]:
        return {"model-parallel-rng": torch.get_rng_state()}


def configuration(case: dict[str, Any]) -> TransformerConfig:
    """megatron-core's configuration at the grid of a case."""
    return TransformerConfig(
        **case["model"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        pipeline_dtype=torch.bfloat16,
        use_cpu_initialization=True,
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        virtual_pipeline_model_parallel_size=case.get("vpp"),
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=case.get("etp", case["tp"]),
        num_layers_in_first_pipeline_stage=case.get("first"),
        moe_token_dispatcher_type="allgather",
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_comm=False,
        finalize_model_grads_func=finalize_model_grads,
    )


def build(case: dict[str, Any], config: TransformerConfig) -> list[GPTModel]:
    """The chunks of the model that this rank holds."""
    chunks = []
    for stage in range(case["vpp"]) if case.get("vpp") else [None]:
        block = get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)
        mtp = get_gpt_mtp_block_spec(config, block, False, vp_stage=stage) if config.mtp_num_layers else None
        chunks.append(
            GPTModel(
                config,
                block,
                vocab_size=case["rows"],
                max_sequence_length=LENGTH,
                pre_process=mpu.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
                post_process=mpu.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
                share_embeddings_and_output_weights=case["tied"],
                position_embedding_type="rope",
                rotary_base=case["base"],
                mtp_block_spec=mtp,
                vp_stage=stage,
            )
        )
    own = 100 * mpu.get_expert_model_parallel_rank() + mpu.get_expert_tensor_parallel_rank()
    generator = torch.Generator().manual_seed(own)
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            if ".experts." in name:
                parameter.data.normal_(std=0.02, generator=generator)
            parameter.data = parameter.data.to(config.params_dtype)
    return chunks


def train(case: dict[str, Any], config: TransformerConfig, chunks: list[GPTModel]) -> tuple[Any, Any, Any]:
    """Two steps of Adam; the wrapped chunks, the optimizer and the schedule."""
    ddp = DistributedDataParallelConfig(use_distributed_optimizer=case["distributed"], grad_reduce_in_fp32=True)
    wrapped = [DistributedDataParallel(config, ddp, chunk) for chunk in chunks]
    settings = OptimizerConfig(
        optimizer="adam",
        lr=0.01,
        min_lr=0.0,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=case["distributed"],
    )
    optimizer = get_megatron_optimizer(settings, wrapped)
    schedule = OptimizerParamScheduler(optimizer, 0.01, 0.01, 0.0, 0, 100, "linear", 0.01, 0.01, 100, "constant")
    run = get_forward_backward_func()
    for step in range(case.get("steps", 2)):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        data = [batches(case, step) for _ in wrapped]
        run(
            forward_step_func=forward_step,
            data_iterator=data if len(data) > 1 else data[0],
            model=wrapped if len(wrapped) > 1 else wrapped[0],
            num_microbatches=case["pp"],
            seq_length=LENGTH,
            micro_batch_size=BATCH,
            forward_only=False,
        )
        good, norm, _ = optimizer.step()
        assert good and norm > 0, (good, norm)
        schedule.step(1)
    return wrapped, optimizer, schedule


def batches(case: dict[str, Any], step: int) -> Iterator[torch.Tensor]:
    """Tokens without end, other ones on each data-parallel rank."""
    generator = torch.Generator().manual_seed(100 * step + mpu.get_data_parallel_rank())
    while True:
        yield torch.randint(case["rows"] - 3, (BATCH, LENGTH), generator=generator)


def forward_step(data: Iterator[torch.Tensor], model: Any) -> Any:
    """The loss of a batch that predicts its own tokens."""
    tokens = next(data)
    positions = torch.arange(LENGTH).expand(BATCH, LENGTH)
    mask = torch.ones(BATCH, 1, LENGTH, LENGTH, dtype=torch.bool).triu(1)
    output = model(tokens, positions, mask, labels=tokens.roll(-1, 1), loss_mask=torch.ones(BATCH, LENGTH))

    def loss(found: torch.Tensor) -> Any:
        return found.float().mean(), {}

    return output, loss


def arguments(case: dict[str, Any]) -> argparse.Namespace:
    """What Megatron-LM's own parser would hold of this model, and some of what it holds besides."""
    model = dict(case["model"])
    named = {"num_moe_experts": "num_experts", "layernorm_epsilon": "norm_epsilon"}
    fields = {named.get(name, name): value for name, value in model.items()}
    return argparse.Namespace(
        **fields,
        swiglu=True,
        normalization="RMSNorm",
        add_bias_linear=False,
        untie_embeddings_and_output_weights=not case["tied"],
        padded_vocab_size=case["rows"],
        vocab_size=case["vocab"],
        seq_length=LENGTH,
        max_position_embeddings=LENGTH,
        position_embedding_type="rope",
        rotary_base=case["base"],
        tensor_model_parallel_size=case["tp"],
        pipeline_model_parallel_size=case["pp"],
        virtual_pipeline_model_parallel_size=case.get("vpp"),
        expert_model_parallel_size=case.get("ep", 1),
        expert_tensor_parallel_size=case.get("etp", case["tp"]),
        bf16=True,
        params_dtype=torch.bfloat16,
        save=Path("checkpoints"),
        lr=0.01,
        use_distributed_optimizer=case["distributed"],
    )


def random_state() -> list[dict[str, Any]]:
    """The generators' states as Megatron-LM's get_rng_state has them."""
    return [
        {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "cuda_rng_state": torch.get_rng_state(),
            "rng_tracker_states": tensor_parallel.get_cuda_rng_tracker().get_states(),
        }
    ]


def everything(case: dict[str, Any], chunks: list[Any], schedule: Any) -> dict[str, Any]:
    """The state but for model and optimizer, as generate_state_dict of megatron/training/checkpointing.py has it."""
    return {
        "args": arguments(case),
        "checkpoint_version": 3.0,
        "iteration": 2,
        "opt_param_scheduler": schedule.state_dict(),
        "num_floating_point_operations_so_far": 12345.0,
    }


def names(chunks: list[Any]) -> list[str]:
    """The keys of the model's chunks in the state."""
    return ["model"] if len(chunks) == 1 else [f"model{i}" for i in range(len(chunks))]


def save_distributed(case: dict[str, Any], chunks: list[Any], optimizer: Any, schedule: Any) -> None:
    """As save_checkpoint with --ckpt-format torch_dist does."""
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True, **case.get("metadata", {})}
    state = everything(case, chunks, schedule)
    for name, chunk in zip(names(chunks), chunks, strict=True):
        state[name] = chunk.sharded_state_dict(metadata=metadata)
    state["optimizer"] = optimizer.sharded_state_dict(state, metadata=metadata)
    grid = mpu.get_pipeline_model_parallel_world_size(), mpu.get_tensor_model_parallel_world_size()
    place = mpu.get_pipeline_model_parallel_rank(), mpu.get_tensor_model_parallel_rank()
    replica = mpu.get_data_parallel_rank(with_context_parallel=True)
    state["rng_state"] = ShardedObject("rng_state", random_state(), grid, place, replica_id=replica)
    target = Path(case["out"]) / "iter_0000002"
    target.mkdir(parents=True, exist_ok=True)
    dist_checkpointing.save(state, str(target), content_metadata=metadata)


def save_legacy(case: dict[str, Any], chunks: list[Any], optimizer: Any, schedule: Any) -> None:
    """As save_checkpoint with --ckpt-format torch does, of get_checkpoint_name's folder."""
    ranks = mpu.get_tensor_model_parallel_rank(), mpu.get_pipeline_model_parallel_rank()
    name = f"mp_rank_{ranks[0]:02d}" + (f"_{ranks[1]:03d}" if case["pp"] > 1 else "")
    name += f"_{mpu.get_expert_model_parallel_rank():03d}" if case.get("ep", 1) > 1 else ""
    folder = Path(case["out"]) / "iter_0000002" / name
    folder.mkdir(parents=True, exist_ok=True)
    state = everything(case, chunks, schedule)
    for key, chunk in zip(names(chunks), chunks, strict=True):
        state[key] = chunk.state_dict_for_save_checkpoint()
    state["rng_state"] = random_state()
    if case["distributed"]:
        optimizer.save_parameter_state(str(folder / "distrib_optim.pt"))
    if mpu.get_data_parallel_rank() == 0 or (case.get("ep", 1) > 1 and mpu.get_expert_data_parallel_rank() == 0):
        state["optimizer"] = optimizer.state_dict()
        torch.save(state, folder / "model_optim_rng.pt")


def note(case: dict[str, Any], chunks: list[Any]) -> None:
    """This rank's live parameters, where the test reads them."""
    found = [(name, layer, value.detach().clone()) for chunk in chunks for name, layer, value in parameters(chunk)]
    place = {
        "tp": (mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
        "ep": (mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()),
        "etp": (mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()),
    }
    Path(case["out"]).mkdir(parents=True, exist_ok=True)
    torch.save({"place": place, "parameters": found}, Path(case["out"]) / f"live-{dist.get_rank()}.pt")


def run_case(case: dict[str, Any], before: dict[str, Any] | None) -> None:
    """Build, train, note, save in the format that the case asks for."""
    start(case, before)
    config = configuration(case)
    chunks = build(case, config)
    before = [parameter.detach().clone() for chunk in chunks for parameter in chunk.parameters()]
    _, optimizer, schedule = train(case, config, chunks)
    after = [parameter for chunk in chunks for parameter in chunk.parameters()]
    moved = any(not torch.equal(one, two) for one, two in zip(before, after, strict=True))
    assert moved == (case.get("steps", 2) > 0)
    note(case, chunks)
    (save_legacy if case["format"] == "torch" else save_distributed)(case, chunks, optimizer, schedule)
    dist.barrier()
    if dist.get_rank() == 0:
        (Path(case["out"]) / "latest_checkpointed_iteration.txt").write_text("2")


def main(path: str) -> None:
    """Run every case; a line per case in PATH.out."""
    cases = json.loads(Path(path).read_text())
    dist.init_process_group("gloo")
    for before, case in zip([None, *cases], cases, strict=False):
        with OnCpu():
            run_case(case, before)
        if dist.get_rank() == 0:
            with Path(f"{path}.out").open("a") as file:
                file.write(json.dumps({"case": case["name"], "ok": True, "failures": []}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
