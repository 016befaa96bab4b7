"""Megatron's side files: common.pt, metadata.json, trackers, run_config.yaml.

Fields as measured with Megatron-LM 0.15-main and Megatron Bridge 0.3.1: without many of them another model is loaded.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from transcoder.formats.archive import archive, tensor_record
from transcoder.formats.pickles import Global, Pairs, Record, dumps
from transcoder.spec import DTYPES

# What makes a loading model ask for the keys of each dialect; a file that lies here cannot be loaded.
CONTENT: dict[str, dict[str, object]] = {
    "stacked": {"singleton_local_shards": False, "chained_optim_avoid_prefix": True},
    "per-layer": {
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "non_homogeneous_layers": True,
    },
    "singleton": {"singleton_local_shards": True, "chained_optim_avoid_prefix": True},
}

# Fields that Megatron-LM's arguments spell otherwise; the others have the same name there.
SPELLED = {
    "num_moe_experts": "num_experts",
    "layernorm_epsilon": "norm_epsilon",
    "gated_linear_unit": "swiglu",
    "rope_scaling": "use_rope_scaling",
    "seq_len_interpolation_factor": "rotary_seq_len_interpolation_factor",
    "layernorm_zero_centered_gamma": "apply_layernorm_1p",
}
ONLY_FIELDS = ("vocab_size", "share_embeddings_and_output_weights", "activation_func", "rotary_base_local", "_target_")
SILU = "torch.nn.functional.silu"


def metadata_json(backend: str) -> bytes:
    """The file that names the format; without it nothing accepts the directory."""
    fields = {"sharded_backend": backend, "sharded_backend_version": 1}
    return json.dumps({**fields, "common_backend": "torch", "common_backend_version": 1}).encode()


SQUARED_RELU = "megatron.core.activations.squared_relu"


def common_pt(
    fields: Mapping[str, Any], dtype: str, padded_vocab: int, tp: int, pp: int, iteration: int, dialect: str
) -> bytes:
    """The bytes of common.pt: `args` as an argparse.Namespace of plain values, and what loaders ask for."""
    args = Record(Global("argparse", "Namespace"), (), _pairs(arguments(fields, dtype, padded_vocab, tp, pp)))
    values = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": iteration,
        "content_metadata": dict(CONTENT[dialect]),
    }
    return archive(dumps(values))


def _pairs(values: Mapping[str, object]) -> Pairs:
    return Pairs(list(values.items()))


def arguments(fields: Mapping[str, Any], dtype: str, padded_vocab: int, tp: int, pp: int) -> dict[str, object]:
    """Megatron-LM's arguments of a model, by the names in megatron/training/arguments.py."""
    return (
        {"rotary_percent": 1.0, "apply_layernorm_1p": False}
        | {SPELLED.get(name, name): value for name, value in fields.items() if name not in ONLY_FIELDS}
        | {
            "group_query_attention": True,
            "max_position_embeddings": fields["seq_length"],
            "rotary_base": _whole(fields["rotary_base"]),
            "rotary_interleaved": False,
            "squared_relu": fields.get("activation_func") == SQUARED_RELU,
            "untie_embeddings_and_output_weights": not fields["share_embeddings_and_output_weights"],
            "apply_query_key_layer_scaling": False,
            "attention_dropout": 0.0,
            "hidden_dropout": 0.0,
            "padded_vocab_size": padded_vocab,
            "tensor_model_parallel_size": tp,
            "pipeline_model_parallel_size": pp,
            "bf16": dtype == "bfloat16",
            "fp16": dtype == "float16",
            "params_dtype": Global("torch", dtype),
        }
    )


def _whole(value: float) -> float:
    """An integer where it is one, as Megatron-LM's own arguments have it."""
    return int(value) if value == int(value) else value


def run_config(fields: Mapping[str, Any], dtype: str) -> str:
    """run_config.yaml for Megatron Bridge: the fields without which it loads a different model or none."""
    import yaml

    kept = {name: value for name, value in fields.items() if not name.startswith("rotary_base")}
    base, local = float(fields["rotary_base"]), fields.get("rotary_base_local")  # Gemma 3's provider takes a pair
    model = {
        "_target_": "megatron.bridge.models.gpt_provider.GPTModelProvider",
        **kept,
        "should_pad_vocab": False,
        "make_vocab_size_divisible_by": 1,
        "activation_func": {"_target_": fields.get("activation_func", SILU), "_call_": False},
        "rotary_base": base if local is None else [float(local), base],
        "attention_dropout": 0.0,
        "hidden_dropout": 0.0,
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "params_dtype": {"_target_": f"torch.{dtype}", "_call_": False},
        "tensor_model_parallel_size": 1,
        "pipeline_model_parallel_size": 1,
    }
    tokenizer = {
        "_target_": "megatron.bridge.training.tokenizers.config.TokenizerConfig",
        "tokenizer_type": "HuggingFaceTokenizer",
        "tokenizer_model": {"_target_": "pathlib.Path"},
    }
    checkpoint = {"save_rng": False, "save_optim": False, "fully_parallel_save": True}
    text: str = yaml.safe_dump({"model": model, "checkpoint": checkpoint, "tokenizer": tokenizer}, sort_keys=False)
    return text


_COUNTERS = ("consumed_train_samples", "skipped_train_samples", "consumed_valid_samples")


def train_state(iteration: int) -> bytes:
    """train_state.pt of Megatron Bridge: eight 0-d tensors, the step and zeros."""
    fields = [("step", "int32", iteration.to_bytes(4, "little"))]
    fields += [(name, "int32", bytes(4)) for name in _COUNTERS]
    fields += [("floating_point_operations_so_far", "float64", bytes(8))]
    fields += [(name, "bool", bytes(1)) for name in ("do_train", "do_valid", "do_test")]
    records = [(name, tensor_record(i, DTYPES[dtype], ())) for i, (name, dtype, _) in enumerate(fields)]
    return archive(dumps(Pairs(records)), [payload for _, _, payload in fields])
