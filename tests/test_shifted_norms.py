"""The norm inside Qwen3-Next's DeltaNet: Megatron stores it less one, which rounds; it comes back bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import quantised as q
import torch
from zoo import changed, made, read
from zoo_numbers import Config, Tensors, numbers

import transcoder

NORM = "model.layers.1.linear_attn.norm.weight"
OUT_NORM = "decoder.layers.1.self_attention.out_norm.weight"


def awkward(count: int) -> torch.Tensor:
    """Numbers of which many come back as others once 1 was taken off and added in bfloat16."""
    picked = [0.1, 0.3, 0.49, 1e-3, 1e-30, 0.0, -0.0, -0.25, -3.1, 2.0**-133, float("inf"), -float("inf"), float("nan")]
    small = numbers((count - len(picked),), 5)
    return torch.cat([torch.tensor(picked).bfloat16(), small])


def with_norm(tensors: Tensors, _: Config) -> Tensors:
    """A model whose first and second norm hold awkward numbers."""
    wide = {name: tensor for name, tensor in tensors.items() if name.endswith("linear_attn.norm.weight")}
    for name, tensor in wide.items():
        values = numbers(tuple(tensor.shape), 9) * 0.5
        tensors[name] = values if name != NORM else awkward(64)[: len(tensor)]
    return tensors


def big_norm(place: Path) -> Path:
    """Qwen3-Next whose norms do not survive in bfloat16."""
    source = Path(shutil.copytree(made("qwen3-next"), place))
    changed(source, with_norm)
    norm = read(source)[NORM].float()
    assert not torch.equal(((norm - 1).bfloat16().float() + 1).bfloat16().nan_to_num(7), norm.bfloat16().nan_to_num(7))
    return source


def same_bits(one: torch.Tensor, two: torch.Tensor) -> bool:
    """Bit for bit, NaN and signs of zeros too."""
    return one.dtype == two.dtype and torch.equal(one.view(torch.int16), two.view(torch.int16))


def test_a_shifted_norm_comes_back_bit_for_bit(tmp_path: Path) -> None:
    source = big_norm(tmp_path / "source")
    folder = q.imported(source, tmp_path / "mcore", tp=2, verify=True)
    for number, options in enumerate([{}, {"hf_model": source}, {"verify": True}]):
        transcoder.mcore2hf(folder, tmp_path / str(number), sync=False, **options)
        assert q.contents(tmp_path / str(number)) == q.contents(source)
    assert transcoder.verify(source, folder)["differences"] == []
    transcoder.roundtrip(source, tmp_path / "back", megatron_save_path=tmp_path / "other", sync=False)
    transcoder.roundtrip(source, tmp_path / "memory", sync=False)
    for place in ("back", "memory"):
        assert q.contents(tmp_path / place / "source") == q.contents(source)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float16"])
def test_megatron_holds_the_norm_less_one(dtype: str, tmp_path: Path) -> None:
    source, form = big_norm(tmp_path / "source"), getattr(torch, dtype)
    stored = q.loaded(q.imported(source, tmp_path / "mcore", dtype=dtype))[OUT_NORM]
    wanted = (read(source)[NORM].to(form).float() - 1).to(form)
    assert stored.dtype == form and torch.equal(stored.nan_to_num(7), wanted.nan_to_num(7))


@pytest.mark.parametrize("dtype", ["float32"])
def test_a_shifted_norm_comes_back_through_another_dtype(dtype: str, tmp_path: Path) -> None:
    source = big_norm(tmp_path / "source")
    folder = q.imported(source, tmp_path / "mcore", dtype=dtype, verify=True)
    transcoder.mcore2hf(folder, tmp_path / "back", dtype="bfloat16", sync=False)
    assert q.contents(tmp_path / "back") == q.contents(source)


def test_a_trained_norm_is_exported_plus_one(tmp_path: Path) -> None:
    source = big_norm(tmp_path / "source")
    folder = q.imported(source, tmp_path / "mcore")
    stored = q.loaded(folder)[OUT_NORM]
    changed_norm = stored.clone()
    changed_norm[0] = 0.125
    step = q.trained(folder, tmp_path / "step", {OUT_NORM: changed_norm})
    plus_one = (changed_norm.float() + 1).bfloat16()
    transcoder.mcore2hf(step, tmp_path / "alone", sync=False)
    assert torch.equal(read(tmp_path / "alone")[NORM].nan_to_num(7), plus_one.nan_to_num(7))
    transcoder.mcore2hf(step, tmp_path / "back", hf_model=source, sync=False)
    found, original = read(tmp_path / "back"), read(source)
    assert found[NORM][0] == 1.125 and same_bits(found[NORM][1:], original[NORM][1:])
    assert all(same_bits(found[name], original[name]) for name in original if name != NORM)


def test_the_other_norms_are_copied(tmp_path: Path) -> None:
    source, stored = read(made("qwen3-next")), q.loaded(q.imported(made("qwen3-next"), tmp_path / "mcore"))
    pairs = {"input_layernorm.weight": "self_attention.in_proj.layer_norm_weight"}
    pairs |= {"post_attention_layernorm.weight": "pre_mlp_layernorm.weight"}
    for name, key in pairs.items():
        assert same_bits(source[f"model.layers.0.{name}"], stored[f"decoder.layers.0.{key}"])
    assert same_bits(source["model.norm.weight"], stored["decoder.final_layernorm.weight"])
