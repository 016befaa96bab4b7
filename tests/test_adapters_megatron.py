"""PEFT adapters as Megatron Bridge's keys: what each rank holds by Bridge's formulas, read from our files by torch.

The formulas (peft/utils.py and canonical_lora.py of Megatron Bridge): A of a column-parallel linear is cut along the
rank, A of a row-parallel one along its input; B is cut along its rows; q, k and v are interleaved by groups; B of
linear_fc1 goes through megatron-core's `apply_swiglu_sharded_factory`, which decides where the halves are stored.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import adapters
import pytest
import torch
import torch.distributed.checkpoint as dcp
import yaml
import zoo
from command_line import succeed, transcode, tree
from zoo_numbers import Tensors

import transcoder

STEM = "base_model.model.model.layers."
SCALE = 2  # alpha 8, rank 4
LLAMA = r"model\.layers\.\d\..*_proj\.weight"


def _stored(folder: Path) -> Tensors:
    """Every tensor of a checkpoint as torch reads it."""
    reader = dcp.FileSystemReader(folder / "iter_0000000")
    found = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
    }
    dcp.load(found, storage_reader=reader, no_dist=True)
    return found


def _interleaved(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, groups: int) -> torch.Tensor:
    """The rows of q, k and v as linear_qkv has them."""
    parts = [part.reshape(groups, -1, part.shape[-1]) for part in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, q.shape[-1])


def _gated(key: str, local: torch.Tensor, offsets: tuple[tuple[int, int, int], ...], rank: int, tp: int) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory

    cut = (len(offsets), rank, tp)
    whole = ShardedTensor.from_rank_offsets(key, local, *offsets, cut, prepend_axis_num=len(offsets))
    return apply_swiglu_sharded_factory(whole, offsets).build()


def _plain(
    key: str, local: torch.Tensor, offsets: tuple[tuple[int, int, int], ...], axis: int, rank: int, tp: int
) -> Any:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    cut = (len(offsets) + axis, rank, tp)
    return [ShardedTensor.from_rank_offsets(key, local, *offsets, cut, prepend_axis_num=len(offsets))]


def _dense(parts: Tensors, layer: int, layers: int, rank: int, tp: int, groups: int, split: bool) -> Iterator[Any]:
    """The sharded tensors of one layer on one rank."""
    offsets, stem = ((0, layer, layers),), "decoder.layers."

    def a(name: str) -> torch.Tensor:
        return parts[f"{STEM}{layer}.{name}_proj.lora_A.weight"]

    def b(name: str) -> torch.Tensor:
        return parts[f"{STEM}{layer}.{name}_proj.lora_B.weight"]

    def cut(tensor: torch.Tensor, axis: int = 0) -> torch.Tensor:
        return tensor.chunk(tp, dim=axis)[rank].contiguous()

    for module, name in (("self_attention.linear_proj", "self_attn.o"), ("mlp.linear_fc2", "mlp.down")):
        key = f"{stem}{module}.adapter.linear_"
        yield from _plain(f"{key}in.weight", cut(a(name), 1), offsets, 1, rank, tp)
        yield from _plain(f"{key}out.weight", cut(b(name)), offsets, 0, rank, tp)
    qkv, fc1 = f"{stem}self_attention.linear_qkv.adapter.", f"{stem}mlp.linear_fc1.adapter."
    if split:
        for name in "qkv":
            yield from _plain(
                f"{qkv}adapter_{name}.linear_in.weight", cut(a(f"self_attn.{name}")), offsets, 0, rank, tp
            )
            yield from _plain(
                f"{qkv}adapter_{name}.linear_out.weight", cut(b(f"self_attn.{name}")), offsets, 0, rank, tp
            )
        for name in ("gate", "up"):
            yield from _plain(f"{fc1}adapter_{name}.linear_in.weight", cut(a(f"mlp.{name}")), offsets, 0, rank, tp)
            yield from _gated(f"{fc1}adapter_{name}.linear_out.weight", cut(b(f"mlp.{name}")), offsets, rank, tp)
        return
    fused = _interleaved(*(b(f"self_attn.{name}") for name in "qkv"), groups)
    yield from _plain(f"{qkv}linear_in.weight", cut(a("self_attn.q")), offsets, 0, rank, tp)
    yield from _plain(f"{qkv}linear_out.weight", cut(fused), offsets, 0, rank, tp)
    yield from _plain(f"{fc1}linear_in.weight", cut(a("mlp.gate")), offsets, 0, rank, tp)
    yield from _gated(f"{fc1}linear_out.weight", torch.cat([cut(b("mlp.gate")), cut(b("mlp.up"))]), offsets, rank, tp)


def _assert_held(found: Tensors, wanted: list[Any]) -> None:
    """Every rank's part lies where it asks for it, and nothing else is stored."""
    counts = dict.fromkeys(found, 0)
    for part in wanted:
        whole = found[part.key]
        assert tuple(whole.shape) == part.global_shape, part.key
        axes = part.prepend_axis_num
        place = tuple(slice(part.global_offset[i], part.global_offset[i] + 1) for i in range(axes)) + tuple(
            slice(part.global_offset[axes + i], part.global_offset[axes + i] + size)
            for i, size in enumerate(part.data.shape)
        )
        assert torch.equal(whole[place].reshape(part.data.shape), part.data), part.key
        counts[part.key] += part.data.numel()
    assert counts == {key: tensor.numel() for key, tensor in found.items()}


def _shared(parts: Tensors) -> Tensors:
    """The adapter with one A for q, k and v, and one for gate and up."""
    same = {"k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
    found = dict(parts)
    for name in (name for name in parts if "lora_A" in name):
        for module, original in same.items():
            found[name] = parts[name.replace(module, original)] if module in name else found[name]
    return found


def _imported(parts: Tensors, kind: str, place: Path, *options: object) -> tuple[Path, Path]:
    """An adapter's directory and its checkpoint."""
    adapter = adapters.written(place / "adapter", parts)
    succeed("hf2mcore", adapter, place / "m", "--hf-model", zoo.made(kind), "--verify", *options)
    return adapter, place / "m"


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("form", ["canonical", "fused"])
def test_every_rank_finds_its_part_and_peft_its_files(tmp_path: Path, form: str, tp: int) -> None:
    parts = adapters.updates(zoo.read(zoo.made("llama")), LLAMA)
    parts = _shared(parts) if form == "fused" else parts
    adapter, checkpoint = _imported(parts, "llama", tmp_path, "--tp", tp, "--pp", 3, "--lora-form", form)
    wanted = [
        part
        for layer in range(3)
        for rank in range(tp)
        for part in _dense(parts, layer, 3, rank, tp, groups=4, split=form == "canonical")
    ]
    _assert_held(_stored(checkpoint), wanted)
    succeed("check", checkpoint)
    succeed("mcore2hf", checkpoint, tmp_path / "back", "--hf-model", zoo.made("llama"), "--verify")
    assert tree(tmp_path / "back") == tree(adapter)


@pytest.mark.parametrize("ep", [1, 2])
def test_experts_have_their_own_axis(tmp_path: Path, ep: int) -> None:
    parts = adapters.updates(zoo.read(zoo.made("qwen3-moe")), r"model\.layers\.\d\.mlp\.experts\..*_proj\.weight")
    parts = _shared(parts)
    adapter, checkpoint = _imported(parts, "qwen3-moe", tmp_path, "--tp", 2, "--etp", 2, "--ep", ep)
    wanted: list[Any] = []
    stem = "decoder.layers.mlp.experts.experts.linear_"
    for layer, expert, rank in ((x, e, r) for x in range(3) for e in range(4) for r in range(2)):
        offsets, base = ((0, layer, 3), (1, expert, 4)), f"{STEM}{layer}.mlp.experts.{expert}."
        cut = {
            name: parts[f"{base}{name}.weight"].chunk(2, dim=int(name == "down_proj.lora_A"))[rank].contiguous()
            for name in (f"{module}_proj.lora_{part}" for module in ("gate", "up", "down") for part in "AB")
        }
        gated = torch.cat([cut["gate_proj.lora_B"], cut["up_proj.lora_B"]])
        wanted += _plain(f"{stem}fc1.adapter.linear_in.weight", cut["gate_proj.lora_A"], offsets, 0, rank, 2)
        wanted += _gated(f"{stem}fc1.adapter.linear_out.weight", gated, offsets, rank, 2)
        wanted += _plain(f"{stem}fc2.adapter.linear_in.weight", cut["down_proj.lora_A"], offsets, 1, rank, 2)
        wanted += _plain(f"{stem}fc2.adapter.linear_out.weight", cut["down_proj.lora_B"], offsets, 0, rank, 2)
    _assert_held(_stored(checkpoint), wanted)
    succeed("mcore2hf", checkpoint, tmp_path / "back", "--hf-model", zoo.made("qwen3-moe"))
    assert tree(tmp_path / "back") == tree(adapter)


@pytest.mark.parametrize("kind", ["gpt-oss", "qwen3-moe"])
def test_stacked_experts_of_peft_come_back_and_mean_the_same(tmp_path: Path, kind: str) -> None:
    """B @ A of every expert, as Megatron's keys give it, is what PEFT adds to that expert."""
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    model = adapters.trained(kind, tmp_path / "adapter", target_modules=["o_proj"], target_parameters=names)
    before, after = adapters.base(kind).state_dict(), adapters.merged(model)
    succeed("hf2mcore", tmp_path / "adapter", tmp_path / "m", "--hf-model", zoo.made(kind), "--ep", 2, "--verify")
    found, stem = _stored(tmp_path / "m"), "decoder.layers.mlp.experts.experts.linear_"
    for module, name in (("fc1", "gate_up_proj"), ("fc2", "down_proj")):
        a, b = (found[f"{stem}{module}.adapter.linear_{way}.weight"] for way in ("in", "out"))
        for layer in range(3):
            key = f"model.layers.{layer}.mlp.experts.{name}"
            delta = (b[layer] @ a[layer]) * SCALE
            if kind == "gpt-oss":  # turned, and gate and up take turns
                delta = delta.transpose(1, 2)
                delta = torch.stack(delta.chunk(2, -1), -1).flatten(-2) if module == "fc1" else delta
            assert torch.equal(before[key] + delta, after[key])
    succeed("mcore2hf", tmp_path / "m", tmp_path / "back", "--hf-model", zoo.made(kind), "--verify")
    assert tree(tmp_path / "back") == tree(tmp_path / "adapter")


def test_a_checkpoint_without_peft_files_gets_a_config_that_peft_loads(tmp_path: Path) -> None:
    """As Megatron Bridge leaves it: keys and run_config.yaml; one adapter for all parts, its A written thrice."""
    from peft import PeftModel

    parts = _shared(adapters.updates(zoo.read(zoo.made("llama")), LLAMA))
    _, checkpoint = _imported(parts, "llama", tmp_path, "--lora-form", "fused")
    iteration = checkpoint / "iter_0000000"
    (iteration / "transcode-manifest.json").unlink()
    for path in (iteration / "hf").iterdir():
        path.unlink()
    succeed("mcore2hf", checkpoint, tmp_path / "back", "--hf-model", zoo.made("llama"))
    assert all(torch.equal(tensor, parts[name]) for name, tensor in adapters.tensors(tmp_path / "back").items())
    config = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (4, 8, sorted(adapters.LINEARS))
    one = PeftModel.from_pretrained(adapters.base("llama"), tmp_path / "back").merge_and_unload().state_dict()
    two = PeftModel.from_pretrained(adapters.base("llama"), tmp_path / "adapter").merge_and_unload().state_dict()
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("names", [["down_proj"], ["gate_up_proj"], ["gate_up_proj", "down_proj"]])
def test_stacked_experts_of_a_checkpoint_without_peft_files_load(tmp_path: Path, names: list[str]) -> None:
    from peft import PeftModel

    parameters = [f"mlp.experts.{name}" for name in names]
    fields: dict[str, Any] = {"target_modules": ["k_proj"], "target_parameters": parameters}
    expected = adapters.merged(adapters.trained("gpt-oss", tmp_path / "adapter", **fields))
    succeed("hf2mcore", tmp_path / "adapter", tmp_path / "m", "--hf-model", zoo.made("gpt-oss"), "--tp", 2)
    iteration = tmp_path / "m" / "iter_0000000"
    (iteration / "transcode-manifest.json").unlink()
    (iteration / "hf" / "adapter_config.json").unlink()
    succeed("mcore2hf", tmp_path / "m", tmp_path / "back", "--hf-model", zoo.made("gpt-oss"))
    found = PeftModel.from_pretrained(adapters.base("gpt-oss"), tmp_path / "back").merge_and_unload().state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_alpha_is_an_error_that_says_where_to_put_it(tmp_path: Path) -> None:
    parts = adapters.updates(zoo.read(zoo.made("llama")), LLAMA)
    _, checkpoint = _imported(parts, "llama", tmp_path)
    iteration = checkpoint / "iter_0000000"
    (iteration / "transcode-manifest.json").unlink()
    (iteration / "hf" / "adapter_config.json").unlink()
    table = yaml.safe_load((iteration / "run_config.yaml").read_text())
    del table["peft"]["alpha"]
    (iteration / "run_config.yaml").write_text(yaml.safe_dump(table))
    refused = transcode("mcore2hf", checkpoint, tmp_path / "back", "--hf-model", zoo.made("llama"))
    assert refused.code == 3 and "peft.alpha" in refused.err, refused.err


def test_parts_without_updates_are_zero_in_a_fused_adapter(tmp_path: Path) -> None:
    parts = _shared(adapters.updates(zoo.read(zoo.made("llama")), r"model\.layers\.\d\.self_attn\.[qv]_proj\.weight"))
    adapter, checkpoint = _imported(parts, "llama", tmp_path, "--lora-form", "fused")
    found = _stored(checkpoint)["decoder.layers.self_attention.linear_qkv.adapter.linear_out.weight"]
    for layer in range(3):
        q, v = (parts[f"{STEM}{layer}.self_attn.{name}_proj.lora_B.weight"] for name in "qv")
        assert torch.equal(found[layer], _interleaved(q, torch.zeros_like(v), v, 4))
    succeed("mcore2hf", checkpoint, tmp_path / "back", "--hf-model", zoo.made("llama"), "--verify")
    assert tree(tmp_path / "back") == tree(adapter)


def test_different_as_are_refused_for_a_fused_adapter_and_fit_the_canonical_form(tmp_path: Path) -> None:
    adapter = adapters.written(tmp_path / "a", adapters.updates(zoo.read(zoo.made("llama")), LLAMA))
    line = ["hf2mcore", adapter, tmp_path / "m", "--hf-model", zoo.made("llama")]
    refused = transcode(*line, "--lora-form", "fused")
    assert refused.code == 3 and "--lora-form canonical" in refused.err, refused.err
    assert not (tmp_path / "m").exists()
    succeed(*line)


def test_layers_that_differ_get_keys_with_numbers(tmp_path: Path) -> None:
    parts = adapters.updates(zoo.read(zoo.made("llama")), r"model\.layers\.[02]\.self_attn\.q_proj\.weight")
    parts |= adapters.updates(zoo.read(zoo.made("llama")), r"model\.layers\.1\.mlp\.down_proj\.weight", rank=6)
    adapter = adapters.written(tmp_path / "a", parts, rank_pattern={"down_proj": 6}, alpha_pattern={"down_proj": 8})
    report = transcoder.hf2mcore(adapter, tmp_path / "m", hf_model=zoo.made("llama"), tp=2)
    assert any("ranks [4, 6]" in warning for warning in report["warnings"])
    assert {key.rpartition(".linear_")[0] for key in transcoder.open_checkpoint(tmp_path / "m")} == {
        "decoder.layers.0.self_attention.linear_qkv.adapter.adapter_q",
        "decoder.layers.1.mlp.linear_fc2.adapter",
        "decoder.layers.2.self_attention.linear_qkv.adapter.adapter_q",
    }
    table = yaml.safe_load((tmp_path / "m" / "iter_0000000" / "run_config.yaml").read_text())["peft"]
    assert table["target_modules"] == ["*.layers.0.*.linear_q", "*.layers.2.*.linear_q", "*.layers.1.*.linear_fc2"]
    transcoder.mcore2hf(tmp_path / "m", tmp_path / "back", hf_model=zoo.made("llama"))
    assert tree(tmp_path / "back") == tree(adapter)


@pytest.mark.parametrize("form", ["zarr", "zarr3"])
def test_other_formats_hold_adapters_too(tmp_path: Path, form: str) -> None:
    parts = adapters.updates(zoo.read(zoo.made("llama")), LLAMA)
    adapter, checkpoint = _imported(parts, "llama", tmp_path, "--tp", 2, "--format", form)
    succeed("mcore2hf", checkpoint, tmp_path / "back", "--hf-model", zoo.made("llama"))
    assert tree(tmp_path / "back") == tree(adapter)


def test_an_adapter_is_not_merged_into_an_adapter(tmp_path: Path) -> None:
    adapter, checkpoint = _imported(adapters.updates(zoo.read(zoo.made("llama")), LLAMA), "llama", tmp_path)
    for line in (["hf2mcore", adapter], ["mcore2hf", checkpoint]):
        refused = transcode(*line, tmp_path / "x", "--hf-model", zoo.made("llama"), "--merge-adapter", adapter)
        assert refused.code == 2 and "give the model as SRC" in refused.err, refused.err


UNFIT: dict[str, tuple[dict[str, Any], str]] = {
    "another alpha for some": ({"alpha_pattern": {"q_proj": 16}}, "one alpha"),
    "whole modules": ({}, "no whole weights"),
}


@pytest.mark.parametrize("case", UNFIT)
def test_what_megatron_has_no_adapter_for_is_refused_with_the_way_out(tmp_path: Path, case: str) -> None:
    config, reason = UNFIT[case]
    parts = adapters.updates(zoo.read(zoo.made("llama")), LLAMA)
    whole = {"base_model.model.lm_head.weight": torch.zeros(131, 72)} if case == "whole modules" else {}
    adapter = adapters.written(tmp_path / "a", parts | whole, **config)
    refused = transcode("hf2mcore", adapter, tmp_path / "m", "--hf-model", zoo.made("llama"))
    assert refused.code == 3 and reason in refused.err and "--merge-adapter" in refused.err, refused.err


@pytest.mark.parametrize("source", ["adapter", "checkpoint"])
def test_an_adapter_needs_its_base_model(tmp_path: Path, source: str) -> None:
    parts = adapters.updates(zoo.read(zoo.made("llama")), LLAMA)
    adapter, checkpoint = _imported(parts, "llama", tmp_path)
    command, place = ("hf2mcore", adapter) if source == "adapter" else ("mcore2hf", checkpoint)
    refused = transcode(command, place, tmp_path / "out")
    assert refused.code == 2 and "--hf-model" in refused.err, refused.err


def test_an_adapter_is_checked_and_compared_like_any_directory(tmp_path: Path) -> None:
    parts = adapters.updates(zoo.read(zoo.made("llama")), LLAMA)
    one, two = (
        adapters.written(tmp_path / "a", parts),
        adapters.written(tmp_path / "b", parts | {next(iter(parts)): torch.ones(4, 92)}),
    )
    assert succeed("check", one, "--json").report["format"] == "peft"
    succeed("verify", one, one)
    differs = transcode("verify", one, two)
    assert differs.code == 5 and next(iter(parts)) in differs.err, differs.err


def test_only_config_json_of_the_base_is_needed(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_bytes((zoo.made("llama") / "config.json").read_bytes())
    adapter = adapters.written(tmp_path / "a", adapters.updates(zoo.read(zoo.made("llama")), LLAMA))
    transcoder.hf2mcore(adapter, tmp_path / "m", hf_model=tmp_path / "base")
    transcoder.mcore2hf(tmp_path / "m", tmp_path / "back", hf_model=tmp_path / "base", dtype="bfloat16")
    found = adapters.tensors(tmp_path / "back")
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
