"""Directories that torch.distributed.checkpoint wrote for other trainers: torchtitan, Automodel, Megatron-FSDP."""

from __future__ import annotations

import re
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from zoo import KINDS, Tensors, made, read, read_config

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from harness import launch

QUANTISED = {kind for kind in KINDS if "fp8" in kind or "mxfp4" in kind or "int4" in kind}
SHORT = ("llama", "deepseek-v3-mtp", "gemma3-vl", "nemotron-h", "qwen3-moe-mixed", "phi3", "glm4-moe", "qwen3-next-mtp")
KEPT = [pytest.param(kind, marks=[] if kind in SHORT else pytest.mark.slow) for kind in sorted(set(KINDS) - QUANTISED)]
WORKER = Path(__file__).parent / "megatron" / "dcp_worker.py"


def assert_same(one: Path, two: Path) -> None:
    """The same names, types, shapes and bits."""
    left, right = read(one), read(two)
    assert left.keys() == right.keys()
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def config_of(kind: str, folder: Path) -> Path:
    """A reference of config.json alone."""
    folder.mkdir()
    shutil.copy(made(kind) / "config.json", folder)
    return folder


def saved(tensors: dict[str, Any], folder: Path) -> Path:
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder


@pytest.mark.parametrize("kind", KEPT)
def test_hugging_face_names_are_exported(kind: str, tmp_path: Path) -> None:
    source = saved(read(made(kind)), tmp_path / "dcp")
    transcoder.mcore2hf(source, tmp_path / "hf", hf_model=config_of(kind, tmp_path / "config"), sync=False)
    assert_same(made(kind), tmp_path / "hf")


def test_what_two_ranks_of_fsdp_saved_is_exported(tmp_path: Path) -> None:
    kinds = {"llama": "model.", "qwen2-moe": "", "qwen3-moe": "model."}  # Qwen2's gate of one row leaves a rank empty
    cases = [{"hf": str(made(kind)), "prefix": prefix, "out": str(tmp_path / kind)} for kind, prefix in kinds.items()]
    launch(cases, 2, tmp_path, worker=WORKER)
    for kind in kinds:
        reference = config_of(kind, tmp_path / f"{kind} config")
        report = transcoder.mcore2hf(tmp_path / kind, tmp_path / f"{kind} hf", hf_model=reference, sync=False)
        assert_same(made(kind), tmp_path / f"{kind} hf")
        assert {row["prefix"]: row["keys"] for row in report["left_out"]} == {"optim.": 2, "train_state": 1}
        found = transcoder.inspect(tmp_path / kind)
        assert found["format"] == "torch_dcp" and found["parallel"]["ranks"] == 2
        assert transcoder.check(tmp_path / kind)["checked"]["checksums"] > 10


def test_the_tied_output_layer_is_a_copy(tmp_path: Path) -> None:
    kind = next(kind for kind in KINDS if kind.startswith("llama") and read_config(made(kind))["tie_word_embeddings"])
    tensors = read(made(kind))
    source = saved({**tensors, "lm_head.weight": tensors["model.embed_tokens.weight"]}, tmp_path / "dcp")
    report = transcoder.mcore2hf(source, tmp_path / "hf", hf_model=config_of(kind, tmp_path / "config"), sync=False)
    assert_same(made(kind), tmp_path / "hf")
    assert [row["prefix"] for row in report["left_out"]] == ["lm_head.weight"]


def titan(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Names of torchtitan's Llama, its rotary pairs side by side: the loops of Meta's own files."""
    names = (
        (r"model\.embed_tokens", "tok_embeddings"), (r"model\.norm", "norm"), (r"lm_head", "output"),
        (r"model\.layers", "layers"), (r"input_layernorm", "attention_norm"),
        (r"post_attention_layernorm", "ffn_norm"), (r"self_attn\.(.)_proj", r"attention.w\1"),
        (r"mlp\.gate_proj", "feed_forward.w1"), (r"mlp\.up_proj", "feed_forward.w3"),
        (r"mlp\.down_proj", "feed_forward.w2"),
    )  # fmt: skip
    size = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    found = {}
    for name, value in tensors.items():
        new = name
        for pattern, text in names:
            new = re.sub(pattern, text, new)
        if re.search(r"w[qk]\.weight", new):
            rows = [h + s * size // 2 + i for h in range(0, len(value), size) for i in range(size // 2) for s in (0, 1)]
            value = value[rows]
        found[new] = value
    return found


def test_torchtitan_names_its_llama_otherwise(tmp_path: Path) -> None:
    turned = titan(read(made("llama")), read_config(made("llama")))
    source = saved(turned, tmp_path / "dcp")
    reference = config_of("llama", tmp_path / "config")
    transcoder.mcore2hf(source, tmp_path / "hf", hf_model=reference, sync=False)
    assert_same(made("llama"), tmp_path / "hf")
    wrong = "layers.0.attention.wq.weight", "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(turned[wrong[0]], read(made("llama"))[wrong[1]])


def test_other_models_of_torchtitan_are_refused_by_name(tmp_path: Path) -> None:
    source = saved(titan(read(made("qwen3")), read_config(made("qwen3"))), tmp_path / "dcp")
    with pytest.raises(transcoder.InputError, match="only torchtitan's Llama"):
        transcoder.mcore2hf(source, tmp_path / "hf", hf_model=config_of("qwen3", tmp_path / "config"))


def test_a_plain_directory_needs_a_config(tmp_path: Path) -> None:
    source = saved(read(made("llama")), tmp_path / "dcp")
    with pytest.raises(transcoder.InputError, match=r"torch.distributed.checkpoint carries no config; give --hf-model"):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")
    with pytest.raises(transcoder.InputError, match="import that with hf2mcore"):
        transcoder.reshard(source, tmp_path / "mcore", hf_model=made("llama"))


def test_an_unknown_tensor_is_named(tmp_path: Path) -> None:
    source = saved({**read(made("llama")), "model.layers.0.adapter.weight": torch.ones(3)}, tmp_path / "dcp")
    with pytest.raises(transcoder.InputError, match=r"model.layers.0.adapter.weight.*no rule matches"):
        transcoder.mcore2hf(source, tmp_path / "hf", hf_model=made("llama"))


def fused(parts: list[torch.Tensor], groups: int) -> torch.Tensor:
    """Query, key and value rows, group by group."""
    cut = [part.chunk(groups) for part in parts]
    return torch.cat([rows[group] for group in range(groups) for rows in cut])


def module_state(kind: str, grouped: bool) -> dict[str, Any]:
    """What Megatron-FSDP saves of a model: names of modules, gate and up apart, experts by their global numbers."""
    tensors, config = read(made(kind)), read_config(made(kind))
    experts = len({name.split(".")[5] for name in tensors if ".mlp.experts." in name})
    found: dict[str, Any] = {
        "embedding.word_embeddings.weight": tensors["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": tensors["model.norm.weight"],
        "output_layer.weight": tensors["lm_head.weight"],
    }
    for layer in range(config["num_hidden_layers"]):
        old, new = f"model.layers.{layer}.", f"decoder.layers.{layer}."
        parts = [tensors[f"{old}self_attn.{name}_proj.weight"] for name in "qkv"]
        norm = "self_attention.linear_qkv.layer_norm_weight" if grouped else "input_layernorm.weight"
        found |= {
            f"{new}{norm}": tensors[f"{old}input_layernorm.weight"],
            f"{new}self_attention.linear_qkv.weight": fused(parts, config["num_key_value_heads"]),
            f"{new}self_attention.linear_proj.weight": tensors[f"{old}self_attn.o_proj.weight"],
            f"{new}pre_mlp_layernorm.weight": tensors[f"{old}post_attention_layernorm.weight"],
        }
        for name in ("q", "k") if f"{old}self_attn.q_norm.weight" in tensors else ():
            found[f"{new}self_attention.{name}_layernorm.weight"] = tensors[f"{old}self_attn.{name}_norm.weight"]
        if f"{old}mlp.gate.weight" in tensors:
            found[f"{new}mlp.router.weight"] = tensors[f"{old}mlp.gate.weight"]
        for expert in range(experts) if f"{old}mlp.gate.weight" in tensors else ("",):
            start = f"{old}mlp.experts.{expert}." if expert != "" else f"{old}mlp."
            where = "experts." if grouped else f"experts.local_experts.{expert}."
            place, number = (f"{new}mlp.{where}", expert if grouped else "") if expert != "" else (f"{new}mlp.", "")
            found[f"{place}linear_fc1.weight{number}_w"] = tensors[f"{start}gate_proj.weight"]
            found[f"{place}linear_fc1.weight{number}_v"] = tensors[f"{start}up_proj.weight"]
            found[f"{place}linear_fc2.weight{number}"] = tensors[f"{start}down_proj.weight"]
    return found


@pytest.mark.parametrize(("kind", "grouped"), (("llama", False), ("qwen3-moe", False), ("qwen3-moe", True)))
def test_megatron_fsdp_is_exported_and_becomes_torch_dist(kind: str, grouped: bool, tmp_path: Path) -> None:
    config = read_config(made(kind))
    names = {"num_layers": "num_hidden_layers", "ffn_hidden_size": "intermediate_size",
             "num_query_groups": "num_key_value_heads", "kv_channels": "head_dim", "vocab_size": "vocab_size",
             "moe_ffn_hidden_size": "moe_intermediate_size"}  # fmt: skip
    same = ("hidden_size", "num_attention_heads")
    args = {mine: config[theirs] for mine, theirs in names.items() if theirs in config}
    args |= {name: config[name] for name in same} | {"untie_embeddings_and_output_weights": True}
    args["num_experts"] = config.get("num_experts") or config.get("num_local_experts")
    state = {f"model.module.{name}": value for name, value in module_state(kind, grouped).items()}
    moments = {f"optimizer.state.module.module.module.{name}.exp_avg": torch.ones(2) for name in list(state)[:3]}
    source = saved({**state, **moments, "args": Namespace(**args), "iteration": 7}, tmp_path / "fsdp")
    report = transcoder.mcore2hf(source, tmp_path / "hf", arch=config["architectures"][0], sync=False)
    assert_same(made(kind), tmp_path / "hf")
    assert [(row["prefix"], row["keys"]) for row in report["left_out"]] == [("optimizer.", 3)]
    assert transcoder.inspect(source)["format"] == "fsdp_dtensor"
    assert transcoder.inspect(source)["config"]["num_attention_heads"] == config["num_attention_heads"]
    options = {"hf_model": config_of(kind, tmp_path / "config"), "layout": "stacked", "tp": 2, "sync": False}
    transcoder.reshard(source, tmp_path / "mcore", **options)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", sync=False)
    assert_same(made(kind), tmp_path / "back")
