"""Spellings of one architecture: decided by what lies in the files, refused with the evidence where it does not."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import quantised as q
import torch
import zoo
from command_line import transcode
from zoo import Change, changed, made, read, read_config
from zoo_numbers import Config, Tensors

import transcoder
from transcoder import InputError

# Kind, a tensor of one expert as the files have it, and the name of the other spelling.
EXPERTS = {
    "qwen3-moe": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "qwen2-moe": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "olmoe": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "mixtral": ("model.layers.1.block_sparse_moe.experts.2.w2.weight", "model.layers.1.mlp.experts.down_proj"),
    "deepseek-v2": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "deepseek-v3-mtp": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "glm4-moe": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "qwen3-next": ("model.layers.1.mlp.experts.2.down_proj.weight", "model.layers.1.mlp.experts.down_proj"),
    "qwen3-vl-moe": (
        "model.language_model.layers.1.mlp.experts.gate_up_proj",
        "model.language_model.layers.1.mlp.experts.2.down_proj.weight",
    ),
    "gpt-oss": ("model.layers.1.mlp.experts.gate_up_proj", "model.layers.1.mlp.experts.gate_up_proj_blocks"),
}
PREFIXES = {
    "qwen2.5-vl": ("model.layers.", "model.language_model.layers."),
    "qwen2.5-vl-new": ("model.language_model.layers.", "model.layers."),
    "gemma3-vl": ("language_model.model.layers.", "model.language_model.layers."),
}
BIASED = ("deepseek-v3", "deepseek-v3-mtp", "kimi-k2", "glm4-moe", "nemotron-h-moe")


def copy_of(kind: str, place: Path, change: Change) -> Path:
    """A model of one's own, changed."""
    source = Path(shutil.copytree(made(kind), place))
    changed(source, change)
    return source


def evidence(error: InputError) -> str:
    """What the refusal found."""
    assert error.kind == "variant" and all(problem.expected and problem.found for problem in error.problems)
    return " ".join(problem.found for problem in error.problems)


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_in_both_spellings_are_refused_with_the_evidence(kind: str, tmp_path: Path) -> None:
    one, other = EXPERTS[kind]

    def change(tensors: Tensors, _: Config) -> Tensors:
        dtype = torch.uint8 if other.endswith("_blocks") else torch.bfloat16
        return {**tensors, other: torch.ones(4, 72, 72, dtype=dtype)}

    source = copy_of(kind, tmp_path / "source", change)
    error = q.refused(source, tmp_path / "place")
    if not other.endswith("_blocks"):  # blocks without scales are refused as such
        shape = re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(one))
        assert other in evidence(error) and re.search(shape, evidence(error))
    assert "Traceback" not in transcode("plan", source).err


@pytest.mark.parametrize("kind", EXPERTS)
def test_experts_in_no_known_spelling_are_refused(kind: str, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        return {name.replace(".experts.", ".specialists."): tensor for name, tensor in tensors.items()}

    error = q.refused(copy_of(kind, tmp_path / "source", change), tmp_path / "place")
    assert "no tensor like" in evidence(error) and "{" in evidence(error)


@pytest.mark.parametrize("kind", EXPERTS)
def test_one_layer_of_experts_in_the_other_spelling_is_refused(kind: str, tmp_path: Path) -> None:
    start = EXPERTS[kind][0].split("experts.")[0] + "experts."

    def change(tensors: Tensors, _: Config) -> Tensors:
        mine = {name: tensor for name, tensor in tensors.items() if name.startswith(start)}
        rest = {name: tensor for name, tensor in tensors.items() if name not in mine}
        if not EXPERTS[kind][1].endswith(".weight"):
            return {**rest, start.replace("block_sparse_moe", "mlp") + "down_proj": torch.ones(4, 72, 72).bfloat16()}
        return {**rest, f"{start}0.down_proj.weight": torch.ones(72, 72).bfloat16()}

    error = q.refused(copy_of(kind, tmp_path / "source", change), tmp_path / "place")
    assert error.problems


@pytest.mark.parametrize("kind", PREFIXES)
def test_two_prefixes_are_refused_with_the_evidence(kind: str, tmp_path: Path) -> None:
    one, other = PREFIXES[kind]
    name = f"{one}0.input_layernorm.weight"

    def change(tensors: Tensors, _: Config) -> Tensors:
        return {**tensors, name.replace(one, other): tensors[name].clone()}

    error = q.refused(copy_of(kind, tmp_path / "source", change), tmp_path / "place")
    assert one in evidence(error) and name.replace(one, other) in evidence(error)


@pytest.mark.parametrize("kind", PREFIXES)
def test_an_unknown_prefix_is_refused(kind: str, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        return {f"module.{name}": tensor for name, tensor in tensors.items()}

    error = q.refused(copy_of(kind, tmp_path / "source", change), tmp_path / "place")
    assert "no tensor like" in evidence(error)


def square(kind: str, place: Path) -> Path:
    """Qwen3-VL-MoE whose experts' first matrices are square: 2 · 36 = 72."""
    names = {"gate_up_proj": (4, 72, 72), "down_proj": (4, 36, 72) if kind == "qwen3-vl-moe" else (4, 72, 36)}

    def change(tensors: Tensors, config: Config) -> Tensors:
        config["text_config"]["moe_intermediate_size"] = 36
        for name in [name for name in tensors if ".mlp.experts." in name]:
            shape = names[name.rsplit(".", 1)[1]]
            tensors[name] = tensors[name].flatten()[: torch.Size(shape).numel()].reshape(shape).clone()
        return tensors

    return copy_of(kind, place, change)


@pytest.mark.parametrize("kind", ["qwen3-vl-moe", "qwen3-vl-moe-resaved"])
def test_square_experts_that_could_lie_either_way_are_refused(kind: str, tmp_path: Path) -> None:
    source = square(kind, tmp_path / "source")
    error = q.refused(source, tmp_path / "place")
    assert "[4, 72, 72]" in evidence(error)
    with pytest.raises(InputError):
        transcoder.roundtrip(source)


@pytest.mark.parametrize("kind", BIASED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_routers_bias_may_have_either_dtype_and_keeps_it(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        odd = {n: t.to(dtype) for n, t in tensors.items() if n.endswith("e_score_correction_bias")}
        assert odd
        return {**tensors, **odd}

    source = copy_of(kind, tmp_path / "source", change)
    folder = q.imported(source, tmp_path / "mcore", tp=2, verify=True)
    stored = {key: tensor for key, tensor in q.loaded(folder).items() if key.endswith("expert_bias")}
    assert stored and all(tensor.dtype == torch.float32 for tensor in stored.values())
    transcoder.mcore2hf(folder, tmp_path / "back", verify=True, sync=False)
    assert q.contents(tmp_path / "back") == q.contents(source)
    transcoder.roundtrip(source, tmp_path / "memory", sync=False)
    assert q.contents(tmp_path / "memory" / "source") == q.contents(source)


@pytest.mark.parametrize("kind", BIASED)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_verify_finds_no_difference_whatever_the_bias_is(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        return {n: t.to(dtype) if n.endswith("e_score_correction_bias") else t for n, t in tensors.items()}

    source = copy_of(kind, tmp_path / "source", change)
    folder = q.imported(source, tmp_path / "mcore")
    assert transcoder.verify(source, folder)["differences"] == []
    transcoder.roundtrip(source, megatron_load_path=folder, sync=False)


@pytest.mark.parametrize("kind", ["deepseek-v3", "glm4-moe"])
def test_a_bias_in_another_dtype_is_refused(kind: str, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        return {n: t.half() if n.endswith("e_score_correction_bias") else t for n, t in tensors.items()}

    error = q.refused(copy_of(kind, tmp_path / "source", change), tmp_path / "place")
    problems = [problem for problem in error.problems if problem.tensor.endswith("e_score_correction_bias")]
    assert problems and all(problem.expected and problem.found == "float16" for problem in problems)


@pytest.mark.parametrize("kind", ["qwen3-moe", "deepseek-v3", "deepseek-v3-mtp", "glm4-moe", "olmoe", "qwen3-vl-moe"])
def test_experts_are_exported_in_the_other_spelling_and_back(kind: str, tmp_path: Path) -> None:
    first = q.imported(made(kind), tmp_path / "mcore")
    transcoder.mcore2hf(first, tmp_path / "fused", expert_layout="fused", verify=True, sync=False)
    transcoder.mcore2hf(first, tmp_path / "split", expert_layout="per-expert", verify=True, sync=False)
    split = read(tmp_path / "split")
    for name, tensor in read(tmp_path / "fused").items():
        if re.search(r"experts\.(gate_up|down)_proj$", name):
            check_fused(name, tensor, split)
    for place in ("fused", "split"):
        again = q.imported(tmp_path / place, tmp_path / f"{place}-mcore")
        one, two = q.loaded(first), q.loaded(again)
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    fused = {name for name in read(tmp_path / "fused") if re.search(r"experts\.\d+\.", name)}
    assert not fused and any(re.search(r"experts\.\d+\.", name) for name in split)


def check_fused(name: str, tensor: torch.Tensor, split: Tensors) -> None:
    """One tensor for all experts holds gate over up, or down, of each."""
    start, part = name.rsplit(".", 1)
    for number, expert in enumerate(tensor):
        parts = ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",)
        assert torch.equal(expert, torch.cat([split[f"{start}.{number}.{each}.weight"] for each in parts])), name


@pytest.mark.parametrize("kind", ["gpt-oss", "gpt-oss-mxfp4"])
@pytest.mark.parametrize("layout", ["fused", "per-expert"])
def test_a_spelling_that_the_model_does_not_have_is_refused(kind: str, layout: str, tmp_path: Path) -> None:
    folder = q.imported(made(kind), tmp_path / "mcore")
    done = transcode("mcore2hf", folder, tmp_path / "back", "--expert-layout", layout, "--json")
    assert done.code in (2, 3) and layout in done.out and not (tmp_path / "back").exists()


def test_the_original_decides_the_spelling_of_an_export(tmp_path: Path) -> None:
    source = made("qwen3-vl-moe")
    folder = q.imported(made("qwen3-vl-moe-resaved"), tmp_path / "mcore")
    assert read_config(source) == read_config(made("qwen3-vl-moe-resaved"))
    transcoder.mcore2hf(folder, tmp_path / "back", hf_model=source, sync=False)
    wanted, found = read(made("qwen3-vl-moe-resaved")), read(tmp_path / "back")
    turned = re.compile(r".*\.experts\.(gate_up|down)_proj")
    assert found.keys() == wanted.keys() and any(turned.fullmatch(name) for name in wanted)
    for name, tensor in wanted.items():
        assert torch.equal(found[name], tensor.transpose(1, 2) if turned.fullmatch(name) else tensor), name


def test_without_an_original_a_spelling_of_released_files_is_written(tmp_path: Path) -> None:
    folder = q.imported(made("qwen3-vl-moe"), tmp_path / "mcore")
    (folder / "transcode-manifest.json").unlink()
    transcoder.mcore2hf(folder, tmp_path / "back", sync=False)
    again = q.imported(tmp_path / "back", tmp_path / "again")
    one, two = q.loaded(folder), q.loaded(again)
    assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


def test_the_order_of_the_files_does_not_decide(tmp_path: Path) -> None:
    tensors, config = read(made("qwen3-moe")), read_config(made("qwen3-moe"))
    backwards = dict(reversed(tensors.items()))
    for number, rows in enumerate([tensors, backwards]):
        zoo.write(tmp_path / str(number), rows, config)
        transcoder.hf2mcore(tmp_path / str(number), tmp_path / f"m{number}", sync=False)
    one, two = (q.payloads(tmp_path / f"m{number}" / "iter_0000000") for number in range(2))
    assert one == two
