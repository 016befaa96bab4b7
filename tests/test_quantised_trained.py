"""Quantised models after training: scales and codes stay where the values did, and are found anew where not."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import quantised as q
import torch
import zoo
from command_line import names
from zoo import read, read_config
from zoo_numbers import Tensors, in_fp8

import transcoder
from transcoder import InputError

LIKE = {"quantize": "like-source"}


def codes_of(kind: str, name: str) -> torch.Tensor:
    """Every value that a weight of a codec can have under a scale of one."""
    if kind in zoo.MXFP4_KINDS:
        return q.E2M1
    if name.endswith("_packed"):
        return torch.arange(-8, 8).double()
    values = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).double()
    return values[values.isfinite()]


def fresh(kind: str, values: torch.Tensor) -> torch.Tensor:
    """The scale of one block of changed values by the quantisers' own rules."""
    largest = values.abs().max().float()
    if kind in zoo.MXFP4_KINDS:
        return torch.floor(torch.log2(largest)).double() + 127 - 2
    return (largest / 7.5).bfloat16() if kind.endswith("int4") else largest / 448


def blocks_of(kind: str, values: torch.Tensor) -> torch.Tensor:
    """The first block of a weight: a view."""
    if kind in zoo.MXFP4_KINDS:
        return values[0, 0, :32]
    return values[0, :32] if kind.endswith("int4") else values[:128, :128]


@pytest.mark.parametrize("kind", q.BLOCKWISE)
def test_changed_blocks_get_fresh_scales_and_the_others_stay(kind: str, tmp_path: Path) -> None:
    original, weights = read(q.made(kind)), q.decoded(read(q.made(kind)))
    touched = q.quantised(original)[::7]
    for name in touched:
        whole = weights[q.weight_name(name)]
        values = whole.transpose(1, 2) if name.endswith("_blocks") else whole
        block = blocks_of(kind, values)
        block.copy_((block * 1.37 + block.abs().max() / 50).bfloat16())
    source = zoo.write(tmp_path / "trained", weights, q.plain_config(q.made(kind)))
    first = q.imported(source, tmp_path / "mcore", tp=2)
    report = transcoder.mcore2hf(first, tmp_path / "back", hf_model=q.made(kind), sync=False, **LIKE)
    back = read(tmp_path / "back")
    assert {name: tensor.shape for name, tensor in back.items()} == {n: t.shape for n, t in original.items()}
    told = [text for text in report["warnings"] if "scale" in text]
    assert len(told) == len(touched) and all(any(text.startswith(q.weight_name(n)) for n in touched) for text in told)
    for name in touched:
        check_anew(kind, name, original, back, weights[q.weight_name(name)])
    parts = {part for name in touched for part in (name, q.scale_name(name))}
    q.assert_equal(
        {n: t for n, t in back.items() if n not in parts}, {n: t for n, t in original.items() if n not in parts}
    )
    assert read_config(tmp_path / "back") == read_config(q.made(kind))


def check_anew(kind: str, name: str, original: Tensors, back: Tensors, weights: torch.Tensor) -> None:
    """The first block has a fresh scale and the codes nearest to the new values; the rest is the original's."""
    scales, old = back[q.scale_name(name)].clone(), original[q.scale_name(name)].clone()
    wanted = (weights.transpose(1, 2) if name.endswith("_blocks") else weights).double()
    assert scales.flatten()[0].double() == fresh(kind, blocks_of(kind, wanted)).double(), name
    near = blocks_of(kind, wanted).reshape(-1, 1)
    options = codes_of(kind, name) * q.factors(back, name).flatten()[0]
    distance = (blocks_of(kind, q.wide(back, name)).reshape(-1, 1) - near).abs()[:, 0]
    slack = near.abs()[:, 0] * 2.0**-22  # the quotient is rounded to float32
    assert bool((distance <= (options - near).abs().min(1).values + slack).all()), name
    scales.view(-1)[0] = old.view(-1)[0] = 0
    assert torch.equal(scales, old)
    same = q.wide(back, name) == q.wide(original, name)
    blocks_of(kind, same).fill_(True)
    assert bool(same.all())


def test_a_checkpoint_that_torch_saved_after_training(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    original, key = read(q.made("deepseek-v3-fp8")), "decoder.layers.0.self_attention.linear_kv_up_proj.weight"
    changed = q.loaded(checkpoints["deepseek-v3-fp8"])[key]
    changed[200, 129] *= 3
    folder = q.trained(checkpoints["deepseek-v3-fp8"], tmp_path / "step", {key: changed})
    report = transcoder.mcore2hf(folder, tmp_path / "back", hf_model=q.made("deepseek-v3-fp8"), sync=False, **LIKE)
    back, name = read(tmp_path / "back"), "model.layers.0.self_attn.kv_b_proj.weight"
    assert [text for text in report["warnings"] if text.startswith(f"{name}: 1 of its scales")]
    different = [
        each for each in original if not torch.equal(back[each].view(torch.uint8), original[each].view(torch.uint8))
    ]
    assert sorted(different) == [name, f"{name}_scale_inv"]
    assert (back[f"{name}_scale_inv"] != original[f"{name}_scale_inv"]).nonzero().tolist() == [[1, 1]]
    transcoder.mcore2hf(folder, tmp_path / "plain", sync=False)
    assert torch.equal(read(tmp_path / "plain")[name], changed)


def test_one_scale_for_a_whole_weight_is_not_found_anew(tmp_path: Path) -> None:
    weights = q.decoded(read(q.made("kimi-k2-scalar")))
    weights["model.layers.0.self_attn.o_proj.weight"][0, 0] += 1
    source = zoo.write(tmp_path / "trained", weights, q.plain_config(q.made("kimi-k2-scalar")))
    first = q.imported(source, tmp_path / "mcore")
    with pytest.raises(InputError, match=re.escape("model.layers.0.self_attn.o_proj.weight")) as found:
        transcoder.mcore2hf(first, tmp_path / "back", hf_model=q.made("kimi-k2-scalar"), sync=False, **LIKE)
    assert found.value.kind == "quantised" and names(tmp_path) == ["mcore", "trained"]
    transcoder.mcore2hf(first, tmp_path / "back", hf_model=q.made("kimi-k2-scalar"), sync=False)
    q.assert_equal(read(tmp_path / "back"), weights)


def test_a_weight_of_one_block_gets_a_fresh_scale(tmp_path: Path) -> None:
    source, name = zoo.save("kimi-k2", tmp_path / "source"), "model.layers.0.self_attn.o_proj.weight"
    zoo.changed(source, in_fp8)
    assert read(source)[f"{name}_scale_inv"].shape == (1, 1)
    transcoder.roundtrip(source)
    weights = q.decoded(read(source))
    weights[name][3, 5] = 9.0
    first = q.imported(zoo.write(tmp_path / "trained", weights, q.plain_config(source)), tmp_path / "mcore")
    transcoder.mcore2hf(first, tmp_path / "back", hf_model=source, sync=False, **LIKE)
    found = read(tmp_path / "back")
    assert found[f"{name}_scale_inv"].item() == pytest.approx(9 / 448) and q.wide(found, name)[3, 5] == pytest.approx(9)


@pytest.mark.parametrize("kind", q.KINDS)
def test_quantize_without_an_original_is_refused_with_the_next_step(
    kind: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    folder = q.trained(checkpoints[kind], tmp_path / "step", {})
    for source in (folder, q.imported(q.plain(kind), tmp_path / "mcore")):
        with pytest.raises(InputError, match="--hf-model") as found:
            transcoder.mcore2hf(source, tmp_path / "back", sync=False, **LIKE)
        assert found.value.kind == "quantised" and not (tmp_path / "back").exists()
    transcoder.mcore2hf(folder, tmp_path / "back", hf_model=q.made(kind), sync=False, **LIKE)
    assert q.contents(tmp_path / "back") == q.contents(q.made(kind))
