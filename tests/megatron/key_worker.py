"""What models built by megatron-core's own specs ask for: `torchrun … key_worker.py CASES.json`, as worker.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import providers  # noqa: E402

providers.install()

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from key_models import PREDICTED, build, outer_fields  # noqa: E402
from key_oracle import KeyOracle  # noqa: E402
from megatron.core import dist_checkpointing  # noqa: E402
from megatron.core.dist_checkpointing.dict_utils import nested_values  # noqa: E402
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, apply_factories  # noqa: E402
from megatron.core.dist_checkpointing.validation import StrictHandling  # noqa: E402
from megatron.core.transformer.module import Float16Module  # noqa: E402
from models import read_config  # noqa: E402
from oracle import read_tensors  # noqa: E402
from torch.distributed.checkpoint import FileSystemReader  # noqa: E402
from torch.distributed.checkpoint.metadata import TensorStorageMetadata  # noqa: E402
from worker import ACTIONS, DIALECTS, NOT_OF_THE_MODEL, main, place  # noqa: E402

from transcoder.api import plan_hf2mcore  # noqa: E402
from transcoder.mesh import Mesh  # noqa: E402
from transcoder.runtime.device import init_parallel  # noqa: E402

Tensors = dict[str, tuple[tuple[int, ...], str]]  # key → global shape and dtype

providers.without_random_states()


def described(directory: str) -> dict[str, Any]:
    """config.json, and how many layers for multi-token prediction the files hold."""
    predicted = [name for name in read_tensors(directory) if name.endswith(("eh_proj.weight", "mtp.fc.weight"))]
    return read_config(directory) | {PREDICTED: len(predicted)}


def asked(model: Any, metadata: dict[str, Any]) -> tuple[Tensors, set[str]]:
    """What all ranks' models ask for: tensors, objects."""
    state = model.sharded_state_dict(metadata=dict(metadata))
    apply_factories(state)
    items = list(nested_values(state))
    tensors = {x.key: (tuple(x.global_shape), str(x.dtype)) for x in items if isinstance(x, ShardedTensor)}
    objects = {x.unique_key for x in items if isinstance(x, ShardedObject)}
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, (tensors, objects))
    return {key: value for part in parts for key, value in part[0].items()}, set().union(*(part[1] for part in parts))


def stored(folder: str) -> tuple[Tensors, set[str]]:
    """What the checkpoint holds, by torch's own reader."""
    table = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: (tuple(item.size), str(item.properties.dtype))
        for key, item in table.items()
        if isinstance(item, TensorStorageMetadata)
    }
    return tensors, set(table) - set(tensors)


def compare_keys(model: Any, case: dict[str, Any], metadata: dict[str, Any]) -> list[str]:
    """Keys that only one side has, other shapes, and dtypes that the model has neither bare nor in a Float16Module."""
    tensors, objects = stored(case["ckpt"])
    wanted, wanted_objects = asked(model, metadata)
    wrapped, _ = asked(Float16Module(model.config, model).module, metadata)
    wrong = [f"the file lacks {key}" for key in sorted({*wanted, *wanted_objects} - {*tensors, *objects})]
    wrong += [f"nobody asks for {key}" for key in sorted({*tensors, *objects} - {*wanted, *wanted_objects})]
    for key in sorted(set(wanted) & set(tensors)):
        (shape, dtype), (found, found_dtype) = wanted[key], tensors[key]
        if shape != found:
            wrong.append(f"{key} is {found}, the model has {shape}")
        if found_dtype not in (dtype, wrapped[key][1]):
            wrong.append(f"{key} is {found_dtype}, the model has {dtype}")
    return wrong


def contents(model: Any) -> dict[str, torch.Tensor]:
    """Parameters and the buffers that are saved."""
    saved = set(model.state_dict())
    return dict(model.named_parameters()) | {name: x for name, x in model.named_buffers() if name in saved}


def compare_contents(model: Any, oracle: KeyOracle) -> list[str]:
    """Every parameter and buffer that differs from the oracle in any bit."""
    wrong = []
    for name, tensor in contents(model).items():
        want = oracle.expected(name).to(tensor.dtype).contiguous()
        have = tensor.detach().contiguous()
        if want.shape != have.shape or not torch.equal(want.view(torch.uint8), have.view(torch.uint8)):
            wrong.append(f"{name} {tuple(have.shape)} differs from {tuple(want.shape)}")
    return wrong


@torch.no_grad()
def load(model: Any, case: dict[str, Any], metadata: dict[str, Any]) -> None:
    """Fill with NaN, then load with megatron's own loader, which refuses any key too many or too few."""
    for tensor in contents(model).values():
        tensor.fill_(float("nan"))
    wanted = {"model": model.sharded_state_dict(metadata=dict(metadata))}
    loaded = dist_checkpointing.load(wanted, case["ckpt"], strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(loaded["model"], strict=True)


# Of no consequence with multi-latent attention, whose heads have sizes of their own.
NOT_OF_LATENT_ATTENTION = ("kv_channels",)


def compare_fields(model: Any, case: dict[str, Any]) -> list[str]:
    """Fields of our description, or of `args`, that say otherwise than the configuration written by hand."""
    config, hf = model.config, described(case["hf"])
    skipped = NOT_OF_THE_MODEL + NOT_OF_LATENT_ATTENTION * config.multi_latent_attention
    arguments = vars(dist_checkpointing.load_common_state_dict(case["ckpt"])["args"])
    arguments["num_moe_experts"] = arguments.get("num_experts")
    ours = plan_hf2mcore(case["hf"]).model.fields()
    hand = vars(config) | outer_fields(hf)
    wrong = []
    for source, fields in (("fields()", ours), ("args", arguments)):
        names = [name for name in fields if name in hand and name not in skipped and _is_plain(hand[name])]
        assert len(names) > 10, names
        wrong += [
            f"{source}: {name} is {fields[name]!r}, by hand {hand[name]!r}"
            for name in names
            if _plain(fields[name]) != _plain(hand[name])
        ]
    return wrong


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str | list | tuple)


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def run_keys(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """Load; compare every parameter, then keys, shapes and dtypes, then the description."""
    mesh = Mesh(case["tp"], 1, case["ep"], case["etp"])
    init_parallel(mesh)
    config, metadata = described(case["hf"]), dict(dist_checkpointing.load_content_metadata(case["ckpt"]) or {})
    rows = stored(case["ckpt"])[0]["embedding.word_embeddings.weight"][0][0]
    model = build(config, mesh, rows)
    out.update(parameters=len(contents(model)), objects=len(stored(case["ckpt"])[1]))
    keys = compare_keys(build(config, mesh, rows), case, metadata)
    if keys:
        return keys
    load(model, case, metadata)
    return compare_contents(model, KeyOracle(case["hf"], config, place(), rows)) + compare_fields(model, case)


@torch.no_grad()
def run_save(case: dict[str, Any], out: dict[str, Any]) -> list[str]:
    """Fill from the Hugging Face files and save as training does: everything that megatron lets be in bfloat16."""
    mesh = Mesh(case["tp"], 1, case["ep"], case["etp"])
    init_parallel(mesh)
    config = described(case["hf"])
    rows = -(-config["vocab_size"] // mesh.tp) * mesh.tp
    model = build(config, mesh, rows)
    model = Float16Module(model.config, model).module
    oracle = KeyOracle(case["hf"], config, place(), rows)
    for name, tensor in contents(model).items():
        tensor.copy_(oracle.expected(name))
    state = {
        "checkpoint_version": 3.0,
        "iteration": 0,
        "model": model.sharded_state_dict(metadata=dict(DIALECTS["stacked"])),
    }
    Path(case["ckpt"]).mkdir(parents=True, exist_ok=True)
    dist.barrier()
    dist_checkpointing.save(state, case["ckpt"], content_metadata=DIALECTS["stacked"])
    dist.barrier()
    out["parameters"] = len(contents(model))
    return []


ACTIONS |= {"keys": run_keys, "save-keys": run_save}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
