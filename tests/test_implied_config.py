"""A Megatron checkpoint without a Hugging Face config: Megatron's own configuration says what config.json must."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from zoo import KINDS, Tensors, made, read, read_config

import transcoder
from transcoder.api import plan_hf2mcore
from transcoder.hfconfig import normalise
from transcoder.recipe import Field

# Towers are not in Megatron's configuration, nor is a list of layers' kinds.
SEEING = {kind for kind in KINDS if "vl" in kind}
IMPLIED = sorted(set(KINDS) - SEEING - {"nemotron-h-resaved", "qwen3-next"})


def bare(kind: str, folder: Path, *lost: str) -> Path:
    """A checkpoint without the original's files, as Megatron itself saves them."""
    transcoder.hf2mcore(made(kind), folder, sync=False)
    iteration = folder / "iter_0000000"
    shutil.rmtree(iteration / "hf")
    for name in ("transcode-manifest.json", *lost):
        (iteration / name).unlink()
    return folder


def architecture(kind: str) -> str:
    return str(read_config(made(kind))["architectures"][0])


def assert_same(found: Tensors, wanted: Tensors, padded: bool = False) -> None:
    """The same tensors; those with a row per token may have rows of zeros after them."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        rows = found[name][: len(tensor)] if padded and ("embed" in name or "head" in name) else found[name]
        assert torch.equal(rows, tensor), name


@pytest.mark.parametrize("kind", IMPLIED)
def test_the_weights_come_back_from_the_yaml_or_from_the_arguments(kind: str, tmp_path: Path) -> None:
    source, wanted = bare(kind, tmp_path / "mcore"), read(made(kind))
    report = transcoder.mcore2hf(source, tmp_path / "yaml", arch=architecture(kind), sync=False)
    assert_same(read(tmp_path / "yaml"), wanted)
    assert any("config.json follows from Megatron's own configuration" in text for text in report["warnings"])
    (source / "iter_0000000" / "run_config.yaml").unlink()
    report = transcoder.mcore2hf(source, tmp_path / "args", arch=architecture(kind), sync=False)
    assert_same(read(tmp_path / "args"), wanted, padded=True)
    assert any(text.startswith("vocab_size is ") for text in report["warnings"])


@pytest.mark.parametrize("kind", IMPLIED)
def test_the_implied_config_gives_the_same_megatron_configuration(kind: str, tmp_path: Path) -> None:
    transcoder.mcore2hf(bare(kind, tmp_path / "mcore"), tmp_path / "back", arch=architecture(kind), sync=False)
    one, two = (plan_hf2mcore(path).model for path in (made(kind), tmp_path / "back"))
    both_ways = {name for name, text in one.recipe.model.items() if isinstance(text, Field)}
    assert len(both_ways) >= 9
    assert [(name, one.fields().get(name)) for name in sorted(both_ways)] == [
        (name, two.fields().get(name)) for name in sorted(both_ways)
    ]


def test_the_class_has_to_be_named(tmp_path: Path) -> None:
    source = bare("llama", tmp_path / "mcore")
    with pytest.raises(transcoder.InputError, match="--arch NAME"):
        transcoder.mcore2hf(source, tmp_path / "back")
    with pytest.raises(transcoder.InputError, match="not supported"):
        transcoder.mcore2hf(source, tmp_path / "back", arch="NobodyForCausalLM")


def test_another_class_does_not_fit(tmp_path: Path) -> None:
    source = bare("qwen3", tmp_path / "mcore")
    with pytest.raises(transcoder.InputError, match="q_layernorm"):
        transcoder.mcore2hf(source, tmp_path / "back", arch="LlamaForCausalLM")


@pytest.mark.parametrize("text", ["[", "a: &a [*a]", "!!python/object:os.system {}", "model: 3", "x: " + "[" * 2000])
def test_a_damaged_yaml_is_no_crash(tmp_path: Path, text: str) -> None:
    source = bare("llama", tmp_path / "mcore")
    (source / "iter_0000000" / "run_config.yaml").write_text(text)
    try:
        transcoder.mcore2hf(source, tmp_path / "back", arch="LlamaForCausalLM")
    except transcoder.InputError as error:
        assert "YAML" in str(error)
    else:
        assert read_config(tmp_path / "back")["hidden_size"] == read_config(made("llama"))["hidden_size"]


def test_transformers_4_and_5_spell_the_same_model() -> None:
    config = read_config(made("llama"))
    rope = config.pop("rope_parameters")
    older = config | {"rope_theta": rope["rope_theta"], "torch_dtype": config["dtype"], "rope_scaling": None}
    newer = config | {"rope_parameters": rope}
    scopes = [normalise(table) for table in (older, newer)]
    names = ("rope_theta", "dtype", "hidden_size", "tie_word_embeddings")
    assert [scopes[0][name] for name in names] == [scopes[1][name] for name in names]
