"""Adapters merged while streaming equal what the PEFT library's `merge_and_unload` gives in float32.

Bit for bit, where B · A is exact: then only the sum with the weight rounds, once on both sides. Where it is not, the
two add the products of one element in different orders, and float32 results may differ in their last bits: bfloat16
then differs by at most one step, and nearly nowhere.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import adapters
import hollow
import pytest
import torch
import zoo
from command_line import succeed, transcode
from zoo_numbers import Tensors

import transcoder

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "grouped heads, square and oblong": ("llama", {}),
    "patterns": ("llama", {"rank_pattern": {"q_proj": 6, "layers.1.*.down_proj": 2}, "alpha_pattern": {"v_proj": 32}}),
    "rank-stabilised": ("llama", {"use_rslora": True, "lora_alpha": 16}),
    "some layers": ("llama", {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1]}),
    "embeddings and head": ("llama", {"target_modules": ["embed_tokens", "lm_head", "q_proj"]}),
    "whole modules": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"]}),
    "biases": ("llama-bias", {"bias": "lora_only"}),
    "a fused projection": ("phi3", {"target_modules": ["qkv_proj", "gate_up_proj"]}),
    "stacked experts, turned": (
        "gpt-oss",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
    "stacked experts of a file per expert": (
        "qwen3-moe",
        {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    ),
}


def _through(kind: str, adapter: Path, place: Path, dtype: str, *, late: bool = False) -> Tensors:
    """The weights of an import and an export, the adapter merged on the way out (`late`) or in."""
    option = {"merge_adapter": adapter}
    transcoder.hf2mcore(
        zoo.made(kind), place / "m", tp=2, **({} if late else {**option, "dtype": dtype, "verify": True})
    )
    transcoder.mcore2hf(place / "m", place / "hf", dtype=dtype, verify=True, **(option if late else {}))
    return zoo.read(place / "hf")


def _expected(kind: str, merged: Tensors) -> Tensors:
    """The merged weights by the names in the files, which hold experts one by one where the model stacks them."""
    found: Tensors = {}
    for name in zoo.read(zoo.made(kind)):
        stem, _, rest = name.partition(".experts.")
        number, _, projection = rest.partition(".")
        if name in merged or not number.isdigit():
            found[name] = merged[name]
        elif projection == "down_proj.weight":
            found[name] = merged[f"{stem}.experts.down_proj"][int(number)]
        else:
            halves = merged[f"{stem}.experts.gate_up_proj"][int(number)].chunk(2)
            found[name] = halves[projection == "up_proj.weight"]
    return found


@pytest.mark.parametrize("late", [False, True], ids=["import", "export"])
@pytest.mark.parametrize("case", SHAPES)
def test_merging_equals_peft_bit_for_bit_where_products_are_exact(tmp_path: Path, case: str, late: bool) -> None:
    kind, config = SHAPES[case]
    model = adapters.trained(kind, tmp_path / "adapter", **config)
    before = zoo.read(zoo.made(kind))
    expected = _expected(kind, adapters.merged(model))
    found = _through(kind, tmp_path / "adapter", tmp_path, "float32", late=late)
    assert found.keys() == expected.keys() == before.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(not torch.equal(found[name], tensor.float()) for name, tensor in before.items())


@pytest.mark.parametrize("config", [{}, {"use_dora": True}], ids=["lora", "dora"])
def test_merging_rounds_once_to_the_target(tmp_path: Path, config: dict[str, Any]) -> None:
    model = adapters.trained("llama", tmp_path / "adapter", exact=False, **config)
    expected = adapters.merged(model)
    found = _through("llama", tmp_path / "adapter", tmp_path, "bfloat16")
    steps = [_steps(found[name], tensor.bfloat16()) for name, tensor in expected.items()]
    assert max(int(step.max()) for step in steps) <= 1
    assert sum(int(step.sum()) for step in steps) <= sum(step.numel() for step in steps) // 1000


def _steps(one: torch.Tensor, two: torch.Tensor) -> torch.Tensor:
    """How many bfloat16 numbers lie between two tensors, element by element."""
    a, b = (torch.where(bits < 0, -32768 - bits, bits) for bits in (t.view(torch.int16).int() for t in (one, two)))
    return (a - b).abs()


def test_an_adapter_with_a_tensor_per_expert_and_projection_is_merged(tmp_path: Path) -> None:
    weights = zoo.read(zoo.made("qwen3-moe"))
    parts = adapters.updates(weights, r"model\.layers\.\d\.mlp\.experts\.\d\.(gate|up|down)_proj\.weight")
    adapter = adapters.written(tmp_path / "adapter", parts)
    found = _through("qwen3-moe", adapter, tmp_path, "float32")
    stems = {name.rpartition(".lora_")[0] for name in parts}
    assert len(stems) == 36
    for stem in stems:
        name = stem.removeprefix("base_model.model.") + ".weight"
        delta = parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"] * 2
        assert torch.equal(found[name], weights[name].float() + delta)


def test_a_quantised_source_is_decoded_before_it_is_merged(tmp_path: Path) -> None:
    source = zoo.made("deepseek-v3-fp8")
    transcoder.hf2mcore(source, tmp_path / "plain", dtype="float32")
    transcoder.mcore2hf(tmp_path / "plain", tmp_path / "decoded")
    weights = zoo.read(tmp_path / "decoded")
    parts = adapters.updates(weights, r"model\.layers\.\d\.self_attn\.(o_proj|kv_b_proj)\.weight")
    adapter = adapters.written(tmp_path / "adapter", parts)
    transcoder.hf2mcore(source, tmp_path / "m", merge_adapter=adapter, dtype="float32", tp=2)
    transcoder.mcore2hf(tmp_path / "m", tmp_path / "hf")
    found = zoo.read(tmp_path / "hf")
    for name in (name for name in weights if f"base_model.model.{name[:-7]}.lora_A.weight" in parts):
        stem = f"base_model.model.{name[:-7]}"
        delta = parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"] * 2
        assert torch.equal(found[name], weights[name].float() + delta)


def test_bands_of_a_large_weight_meet_their_own_rows(tmp_path: Path) -> None:
    """A weight of several bands and many pieces of a band."""
    from transcoder.engine import bands
    from transcoder.merging import PIECE
    from transcoder.spec import DTYPES

    fields = {"hidden_size": 1056, "intermediate_size": 2100, "num_hidden_layers": 1, "vocab_size": 40}
    wide = zoo.text("Llama", "llama", fields)
    model = zoo._random_model(wide, 7)
    model.save_pretrained(tmp_path / "source")
    weights = zoo.read(tmp_path / "source")
    name = "model.layers.0.mlp.down_proj.weight"
    assert len(list(bands(weights[name].shape, DTYPES["bfloat16"]))) == 2 and weights[name].numel() > 8 * PIECE
    parts = adapters.updates(weights, r".*(gate|down)_proj\.weight")
    adapter = adapters.written(tmp_path / "adapter", parts)
    transcoder.hf2mcore(tmp_path / "source", tmp_path / "m", merge_adapter=adapter, dtype="float32")
    transcoder.mcore2hf(tmp_path / "m", tmp_path / "hf")
    found = zoo.read(tmp_path / "hf")
    stem = "base_model.model.model.layers.0.mlp.down_proj"
    delta = parts[f"{stem}.lora_B.weight"] @ parts[f"{stem}.lora_A.weight"] * 2
    assert torch.equal(found[name], weights[name].float() + delta)


PEAK = """
import re, sys, threading
import transcoder
peak, done = [0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) << 10)
watcher = threading.Thread(target=watch)
watcher.start()
transcoder.hf2mcore(sys.argv[1], sys.argv[2], merge_adapter=sys.argv[3], workers=2, sync=False)
done.set(), watcher.join()
print(peak[0])
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_weights(tmp_path: Path) -> None:
    """Weights of 400 MB, updates of rank 64, under the bound that `--memory` gives: 64 MiB of buffers and 96 more."""
    fields = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 1, "vocab_size": 64}
    config = zoo.BASE | fields | {"num_attention_heads": 32, "num_key_value_heads": 8, **zoo.UNTIED}
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16", **config}
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf" / "config.json").write_text(json.dumps(model))
    shapes = {"self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (1024, 4096), "self_attn.v_proj": (1024, 4096)}
    shapes |= {"self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (14336, 4096), "mlp.up_proj": (14336, 4096)}
    weights = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    weights["model.layers.0.mlp.down_proj.weight"] = (4096, 14336)
    parts = adapters.updates({name: torch.empty(shape, device="meta") for name, shape in weights.items()}, ".*", 64)
    adapter = adapters.written(tmp_path / "adapter", parts, r=64)
    weights |= {f"model.layers.0.{name}_layernorm.weight": (4096,) for name in ("input", "post_attention")}
    weights |= {"model.norm.weight": (4096,), "lm_head.weight": (64, 4096), "model.embed_tokens.weight": (64, 4096)}
    hollow.write_shard(tmp_path / "hf" / "model.safetensors", [(n, "BF16", list(s)) for n, s in weights.items()])
    command = [sys.executable, "-c", PEAK, tmp_path / "hf", tmp_path / "m", adapter]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < (64 + 96) << 20


def _llama_updates() -> Tensors:
    return adapters.updates(zoo.read(zoo.made("llama")), r"model\.layers\.0\.self_attn\.[qk]_proj\.weight")


def test_an_adapter_of_another_model_is_refused_by_name(tmp_path: Path) -> None:
    parts = {name.replace("layers.0", "layers.9"): tensor for name, tensor in _llama_updates().items()}
    adapter = adapters.written(tmp_path / "adapter", parts)
    refused = transcode("hf2mcore", zoo.made("llama"), tmp_path / "m", "--merge-adapter", adapter)
    assert refused.code == 3 and "model.layers.9.self_attn.q_proj" in refused.err, refused.err
    assert "such as model.layers.0.self_attn.q_proj.weight" in refused.err
    assert not (tmp_path / "m").exists()


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "another method": ({"peft_type": "IA3"}, "only LoRA adapters"),
    "another arithmetic": ({"use_qalora": True}, "use_qalora"),
    "another rank": ({"r": 5}, "rank [5]"),
    "another rank of one module": ({"rank_pattern": {"k_proj": 9}}, "rank [9]"),
    "no alpha": ({"lora_alpha": None}, "lora_alpha"),
    "an expression that takes forever": ({"rank_pattern": {"(a+)+b": 4}}, "of no group"),
    "an expression that is none": ({"rank_pattern": {"(": 4}}, "regular expression"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_adapter_that_cannot_be_understood_is_refused(tmp_path: Path, case: str) -> None:
    config, reason = REFUSED[case]
    adapter = adapters.written(tmp_path / "adapter", _llama_updates(), **config)
    refused = transcode("hf2mcore", zoo.made("llama"), tmp_path / "m", "--merge-adapter", adapter)
    assert refused.code == 3 and reason in refused.err, refused.err


DAMAGE = {
    "half an update": (lambda t: {k: v for k, v in t.items() if "q_proj.lora_A" not in k}, "lora_A and lora_B"),
    "another width": (lambda t: {k: v[:, :-1] if "q_proj.lora_A" in k else v for k, v in t.items()}, "a [4, 71]"),
    "another model's key": (lambda t: {**t, "q_proj.lora_A.weight": torch.zeros(4, 72)}, "base_model.model."),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_adapter_is_refused(tmp_path: Path, case: str) -> None:
    damage, reason = DAMAGE[case]
    adapter = adapters.written(tmp_path / "adapter", damage(_llama_updates()))
    refused = transcode("hf2mcore", zoo.made("llama"), tmp_path / "m", "--merge-adapter", adapter)
    assert refused.code == 3 and reason in refused.err, refused.err


def test_the_plan_names_what_is_merged_and_the_manifest_calls_it_changed(tmp_path: Path) -> None:
    adapter = adapters.written(tmp_path / "adapter", _llama_updates())
    line = [zoo.made("llama"), tmp_path / "m", "--merge-adapter", adapter]
    assert "merge 2 updates" in succeed("hf2mcore", *line, "--dry-run").out
    succeed("hf2mcore", *line)
    from transcoder import manifest

    table = manifest.read(tmp_path / "m" / "iter_0000000")
    assert table is not None
    changed = {row["name"] for row in table["tensors"] if not row["exact"]}
    assert changed == {f"model.layers.0.self_attn.{name}_proj.weight" for name in "qk"}


def test_an_adapter_from_a_changed_base_is_told(tmp_path: Path) -> None:
    adapter = adapters.written(tmp_path / "adapter", _llama_updates(), init_lora_weights="pissa_niter_4")
    report = transcoder.hf2mcore(zoo.made("llama"), tmp_path / "m", merge_adapter=adapter)
    assert any("pissa" in warning for warning in report["warnings"])


def test_a_round_trip_cannot_merge(tmp_path: Path) -> None:
    with pytest.raises(transcoder.UsageError, match="cannot merge"):
        transcoder.roundtrip(zoo.made("llama"), merge_adapter=tmp_path)
