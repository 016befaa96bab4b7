"""Quantised sources that are damaged or lie: refused by tensor, with what was expected and what was found."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import quantised as q
import torch
from command_line import transcode
from zoo import changed, made, read, read_config
from zoo_numbers import Config, Tensors

import transcoder
from transcoder import InputError
from transcoder.errors import Problem

Damage = Callable[[Tensors, Config], object]
FP8, MXFP4, INT4, SCALAR = "kimi-k2-fp8", "gpt-oss-mxfp4", "kimi-k2-int4", "kimi-k2-scalar"
W = "model.layers.0.self_attn.kv_b_proj.weight"
S = f"{W}_scale_inv"
B, BS = "model.layers.1.mlp.experts.gate_up_proj_blocks", "model.layers.1.mlp.experts.gate_up_proj_scales"
P = "model.layers.1.mlp.experts.3.down_proj.weight_packed"
PS, PN, PLAIN = (P.replace("_packed", end) for end in ("_scale", "_shape", ""))
NORM = "model.layers.0.input_layernorm.weight"
NS = f"{NORM}_scale_inv"
WHOLE = B.removesuffix("_blocks")


def put(name: str, make: Callable[[torch.Tensor], torch.Tensor]) -> Damage:
    """Another tensor in place of one."""

    def damage(tensors: Tensors, _: Config) -> None:
        tensors[name] = make(tensors[name])

    return damage


def gone(*names: str) -> Damage:
    """Tensors that are missing."""

    def damage(tensors: Tensors, _: Config) -> None:
        for name in names:
            del tensors[name]

    return damage


def renamed(old: str, new: str) -> Damage:
    """A tensor of another name."""

    def damage(tensors: Tensors, _: Config) -> None:
        tensors[new] = tensors.pop(old)

    return damage


def added(name: str, tensor: torch.Tensor) -> Damage:
    """A tensor more."""
    return lambda tensors, _: tensors.update({name: tensor})


def both(*damages: Damage) -> Damage:
    """One after the other."""
    return lambda tensors, config: [damage(tensors, config) for damage in damages]


def shaped(*values: int) -> Damage:
    """A weight_shape that says something else."""
    return put(PN, lambda old: torch.tensor(values, dtype=old.dtype))


def fp8(count: int) -> torch.Tensor:
    """So many ones."""
    return torch.ones(count).to(torch.float8_e4m3fn)


DAMAGES: dict[str, tuple[str, str, Damage]] = {
    "no scale": (FP8, W, gone(S)),
    "no scale for one number": (SCALAR, W, gone(S)),
    "a scale left over": (FP8, S, put(W, lambda t: t.float().bfloat16())),
    "a scale without a weight": (FP8, S, gone(W)),
    "codes without their dtype": (FP8, S, put(W, lambda t: t.view(torch.uint8))),
    "a scale too few rows": (FP8, S, put(S, lambda t: t[:-1])),
    "a scale more columns": (FP8, S, put(S, lambda t: torch.cat([t, t], 1))),
    "transposed scales": (FP8, S, put(S, lambda t: torch.rand(t.shape[1] + 1, t.shape[0] + 2))),
    "flat scales": (FP8, S, put(S, lambda t: t.flatten())),
    "scales of three dimensions": (FP8, S, put(S, lambda t: t[None])),
    "no scales inside": (FP8, S, put(S, lambda t: t[:0])),
    "a scale for every row": (FP8, S, put(S, lambda t: torch.rand(t.shape[0] * 100, 1))),
    "scales in bfloat16": (FP8, S, put(S, lambda t: t.bfloat16())),
    "scales in float16": (FP8, S, put(S, lambda t: t.half())),
    "scales as exponents": (FP8, S, put(S, lambda t: torch.ones(t.shape, dtype=torch.uint8))),
    "a scale in bfloat16 for one number": (SCALAR, S, put(S, lambda t: t.bfloat16())),
    "e5m2": (FP8, W, put(W, lambda t: t.float().to(torch.float8_e5m2))),
    "e5m2 without a scale": (FP8, W, both(gone(S), put(W, lambda t: t.float().to(torch.float8_e5m2)))),
    "scales under another name": (FP8, W, renamed(S, f"{W}_scale")),
    "a norm in FP8": (FP8, NS, both(put(NORM, lambda t: fp8(len(t))), added(NS, torch.ones(2)))),
    "a norm in FP8 without a scale": (FP8, NORM, put(NORM, lambda t: fp8(len(t)))),
    "no block scales": (MXFP4, B, gone(BS)),
    "scales without blocks": (MXFP4, BS, gone(B)),
    "blocks of signed bytes": (MXFP4, BS, put(B, lambda t: t.view(torch.int8))),
    "scales one expert short": (MXFP4, BS, put(BS, lambda t: t[1:])),
    "scales one group short": (MXFP4, BS, put(BS, lambda t: t[..., 1:])),
    "turned scales": (MXFP4, BS, put(BS, lambda t: t.transpose(1, 2))),
    "scales in bfloat16 for blocks": (MXFP4, BS, put(BS, lambda t: t.bfloat16())),
    "blocks of 16 values": (MXFP4, BS, put(B, lambda t: t[..., :8])),
    "blocks run together": (MXFP4, BS, put(B, lambda t: t.flatten(-2))),
    "one row of blocks": (MXFP4, BS, put(B, lambda t: t[0, 0])),
    "experts in both ways": (MXFP4, WHOLE, added(WHOLE, torch.ones(4, 96, 192).bfloat16())),
    "no scale for words": (INT4, P, gone(PS)),
    "no shape": (INT4, P, gone(PN)),
    "no words": (INT4, PS, gone(P)),
    "words of 64 bits": (INT4, PS, put(P, lambda t: t.long())),
    "one word short": (INT4, PS, put(P, lambda t: t[:, 1:])),
    "one row short": (INT4, PS, put(P, lambda t: t[1:])),
    "a group short": (INT4, PS, put(PS, lambda t: t[:, 1:])),
    "flat group scales": (INT4, PS, put(PS, lambda t: t.flatten())),
    "group scales as integers": (INT4, PS, put(PS, lambda t: t.to(torch.int16))),
    "a shape of three": (INT4, PN, shaped(96, 64, 1)),
    "a shape of one": (INT4, PN, shaped(96)),
    "a shape in floats": (INT4, PN, put(PN, lambda t: t.float())),
    "a shape a column short": (INT4, PN, shaped(96, 63)),
    "a shape a row more": (INT4, PN, shaped(97, 64)),
    "a turned shape": (INT4, PN, shaped(64, 96)),
    "a negative shape": (INT4, PN, shaped(-96, -64)),
    "a huge shape": (INT4, PN, shaped(2**31 - 1, 2**31 - 1)),
    "a weight in both ways": (INT4, PLAIN, added(PLAIN, torch.ones(96, 64).bfloat16())),
}  # fmt: skip


def refusal(source: Path, place: Path, **options: Any) -> InputError:
    """The refusal of an import, after which nothing is visible."""
    place.mkdir()
    try:
        transcoder.hf2mcore(source, place / "mcore", workers=1, sync=False, **options)
    except InputError as error:
        assert error.exit_code == 3 and not list(place.iterdir())
        return error
    pytest.fail("accepted")


def about(error: InputError, name: str) -> list[Problem]:
    """The problems that speak of a tensor."""
    return [problem for problem in error.problems if name in (problem.tensor, *re.split(r"[\s;:,]+", str(problem)))]


@pytest.mark.parametrize("what", DAMAGES)
def test_a_damaged_part_is_refused_by_name(what: str, tmp_path: Path) -> None:
    kind, name, damage = DAMAGES[what]
    source = damaged(kind, tmp_path, damage)
    problems = about(refusal(source, tmp_path / "place"), name)
    assert problems and all(problem.expected and problem.found for problem in problems), problems
    with pytest.raises(InputError):
        transcoder.roundtrip(source)


def damaged(kind: str, place: Path, damage: Damage) -> Path:
    """A copy of a model in one file, damaged."""
    tensors, config = read(q.made(kind)), read_config(q.made(kind))
    damage(tensors, config)
    return q.write_shards(place / "source", {"model.safetensors": tensors}, config)


@pytest.mark.parametrize(("values", "found"), [((96, 63), "63"), ((64, 96), "[64, 96]"), ((-96, -64), "-64")])
def test_a_shape_that_lies_is_told_with_its_numbers(values: tuple[int, ...], found: str, tmp_path: Path) -> None:
    error = refusal(damaged(INT4, tmp_path, shaped(*values)), tmp_path / "place")
    assert [problem for problem in error.problems if problem.tensor == PN and found in problem.found], error.problems


def test_what_lacks_its_partner_is_listed_in_full(tmp_path: Path) -> None:
    scales = [q.scale_name(name) for name in q.quantised(read(q.made(FP8)))]
    error = refusal(damaged(FP8, tmp_path, gone(*scales)), tmp_path / "place")
    assert {problem.tensor for problem in error.problems} == set(q.quantised(read(q.made(FP8))))


def test_the_command_tells_of_damage_in_one_object(tmp_path: Path) -> None:
    source = damaged(FP8, tmp_path, gone(S))
    for words in (["hf2mcore", source, tmp_path / "mcore"], ["plan", source], ["roundtrip", source]):
        done = transcode(*words, "--json")
        assert done.code == 3 and "Traceback" not in done.err
        assert [row["tensor"] for row in done.report["error"]["problems"]] == [W]
    assert not (tmp_path / "mcore").exists()


def weights(**fields: Any) -> Config:
    """INT4's config with other fields of its weights."""
    group = {"targets": ["Linear"], "weights": {**q.INT4_WEIGHTS, **fields}}
    return {**q.INT4_CONFIG, "config_groups": {"group_0": group}}


def block(size: Any) -> Config:
    """FP8's config with another block size."""
    return {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": size}


STRANGE_BLOCKS = (
    0, -128, 128, [0, 128], [128, 0], [-128, 128], [128], [128, 128, 128], ["128", "128"], "128", [128.0, 128.0],
    [True, 128], [10**30, 10**30], [1 << 31, 1 << 31], {"n": 128}, [[128], [128]], [None, None], [64, 64], [128, 64],
    "", {}, [], False,
)  # fmt: skip


@pytest.mark.parametrize("size", STRANGE_BLOCKS, ids=str)
def test_a_strange_block_size_is_refused(size: Any, tmp_path: Path) -> None:
    source = configured(FP8, tmp_path, block(size))
    error = refusal(source, tmp_path / "place")
    assert all((problem.file or problem.tensor) and problem.expected and problem.found for problem in error.problems)
    assert error.problems


def configured(kind: str, place: Path, quantisation: Any) -> Path:
    """A model whose config says something else of its quantised weights."""
    return damaged(kind, place, lambda _, config: config.update(quantization_config=quantisation))


STRANGE_GROUPS: dict[str, Any] = {
    "8 bits": weights(num_bits=8), "bits as text": weights(num_bits="4"), "floats": weights(type="float"),
    "asymmetric": weights(symmetric=False), "per channel": weights(group_size=None, strategy="channel"),
    "size 0": weights(group_size=0), "size -1": weights(group_size=-1), "half the size": weights(group_size=16),
    "twice the size": weights(group_size=64), "size as text": weights(group_size="32"),
    "size as list": weights(group_size=[32]), "size as table": weights(group_size={"n": 32}),
    "huge size": weights(group_size=10**30), "size 1.5": weights(group_size=1.5),
    "groups as list": {**q.INT4_CONFIG, "config_groups": [{"weights": q.INT4_WEIGHTS}]},
    "groups as text": {**q.INT4_CONFIG, "config_groups": "group_0"}, "groups as number": {"config_groups": 4},
    "weights as list": {"config_groups": {"group_0": {"weights": [4]}}},
    "weights as text": {"config_groups": {"group_0": {"weights": "int4"}}},
    "a group as text": {"config_groups": {"group_0": "int4"}},
    "two sizes": {"config_groups": {"a": {"weights": q.INT4_WEIGHTS}, "b": {"weights": {"group_size": 64}}}},
}  # fmt: skip


@pytest.mark.parametrize("what", STRANGE_GROUPS)
def test_strange_groups_are_refused(what: str, tmp_path: Path) -> None:
    error = refusal(configured(INT4, tmp_path, STRANGE_GROUPS[what]), tmp_path / "place")
    assert error.problems and all(
        (each.file or each.tensor) and each.expected and each.found for each in error.problems
    )


@pytest.mark.parametrize("kind", [FP8, MXFP4, INT4])
def test_a_config_that_tells_of_quantised_weights_where_there_are_none_is_not_accepted_silently(
    kind: str, tmp_path: Path
) -> None:
    said = read_config(q.made(kind))
    source = q.write_shards(tmp_path / "source", {"model.safetensors": read(q.plain(kind))}, said)
    try:
        warnings = transcoder.hf2mcore(source, tmp_path / "mcore", sync=False)["warnings"]
    except InputError as error:
        assert "quantization_config" in str(error)
    else:
        assert [text for text in warnings if "quantization_config" in text]


def test_other_quantisers_are_refused(tmp_path: Path) -> None:
    linear = "model.layers.0.self_attn.o_proj"

    def gptq(tensors: Tensors, config: Config) -> None:
        rows, columns = tensors.pop(f"{linear}.weight").shape
        tensors[f"{linear}.qweight"] = torch.ones(columns // 8, rows, dtype=torch.int32)
        tensors[f"{linear}.scales"] = torch.ones(1, rows, dtype=torch.float16)
        config["quantization_config"] = {"quant_method": "gptq", "bits": 4}

    def bytes_of_bitsandbytes(tensors: Tensors, config: Config) -> None:
        tensors[f"{linear}.weight"] = tensors[f"{linear}.weight"].to(torch.int8)
        tensors[f"{linear}.SCB"] = torch.ones(len(tensors[f"{linear}.weight"]))
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_8bit": True}

    for number, (damage, name) in enumerate([(gptq, "qweight"), (bytes_of_bitsandbytes, "SCB")]):
        source = shutil.copytree(made("kimi-k2"), tmp_path / str(number))
        changed(source, lambda tensors, config, damage=damage: damage(tensors, config) or tensors)
        assert about(refusal(source, tmp_path / f"place{number}"), f"{linear}.{name}")
