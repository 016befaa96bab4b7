"""What is kept beside a checkpoint of a quantised model: found when damaged, not used when it lies."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest
import quantised as q
import torch
from command_line import flip, transcode
from zoo import made, read, read_config
from zoo_numbers import Tensors

import transcoder
from transcoder import DifferenceError, InputError

FP8 = "kimi-k2-fp8"
W = "model.layers.0.self_attn.kv_b_proj.weight"
S = f"{W}_scale_inv"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of an FP8 model, not to be changed."""
    place = tmp_path_factory.mktemp("good") / "mcore"
    q.imported(q.made(FP8), place)
    return place


def spoilt(path: Path, how: str) -> None:
    """A file that is changed, cut, empty, gone, or something else."""
    size = path.stat().st_size
    data = path.read_bytes()
    path.unlink()
    contents = {"cut": data[:-1], "longer": data + b"\0", "empty": b"", "huge header": b"\xff" * 8 + data[8:]}
    if how in contents:
        path.write_bytes(contents[how])
    elif how in ("payload", "header"):
        path.write_bytes(data)
        flip(path, size - 3 if how == "payload" else 20)
    elif how == "pipe":
        os.mkfifo(path)
    elif how == "folder":
        path.mkdir()


HOW = ("payload", "header", "cut", "longer", "empty", "huge header", "gone", "pipe", "folder")


@pytest.mark.parametrize("how", HOW)
def test_damage_to_the_kept_scales_is_found(how: str, good: Path, tmp_path: Path) -> None:
    own = Path(shutil.copytree(good, tmp_path / "mcore", symlinks=True))
    spoilt(own / "iter_0000000" / "hf-kept.safetensors", how)
    with pytest.raises(DifferenceError) as damage:
        transcoder.check(own)
    assert [problem for problem in damage.value.problems if problem.file == "hf-kept.safetensors"]
    for options in ({}, {"quantize": "like-source"}):
        with pytest.raises(InputError) as found:
            transcoder.mcore2hf(own, tmp_path / "back", sync=False, **options)
        assert [problem for problem in found.value.problems if problem.file == "hf-kept.safetensors"]
        assert [path.name for path in tmp_path.iterdir()] == ["mcore"]


@pytest.mark.parametrize("how", HOW)
def test_without_a_manifest_a_kept_file_that_is_none_is_refused_or_not_used(how: str, tmp_path: Path) -> None:
    folder = q.imported(made("qwen3-next"), tmp_path / "mcore")
    (folder / "transcode-manifest.json").unlink()
    spoilt(folder / "hf-kept.safetensors", how)
    words = ["mcore2hf", tmp_path / "mcore", tmp_path / "back", "--json"]
    done = transcode(*words)
    if done.code == 3:
        assert "hf-kept.safetensors" in done.out and not (tmp_path / "back").exists()
    else:
        assert done.code == 0, done.err
        check_exported(q.loaded(folder), read(tmp_path / "back"))


def check_exported(stored: Tensors, exported: Tensors) -> None:
    """Every shifted norm of an export is one for which Megatron stores what it does."""
    norms = [name for name in exported if name.endswith("linear_attn.norm.weight")]
    assert norms
    for name in norms:
        key = f"decoder.layers.{name.split('.')[2]}.self_attention.out_norm.weight"
        assert torch.equal((exported[name].double() - 1).bfloat16(), stored[key]), name


@pytest.mark.parametrize("change", ["values", "shape", "dtype", "names"])
def test_kept_values_that_lie_are_not_used(change: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = q.imported(made("qwen3-next"), tmp_path / "mcore")
    (folder / "transcode-manifest.json").unlink()
    kept = load_file(folder / "hf-kept.safetensors")
    lies: dict[str, Callable[[str, torch.Tensor], tuple[str, torch.Tensor]]] = {
        "values": lambda name, tensor: (name, tensor * 3),
        "shape": lambda name, tensor: (name, tensor[1:]),
        "dtype": lambda name, tensor: (name, tensor.view(torch.int16)),
        "names": lambda name, tensor: ("model.embed_tokens.weight" + name, tensor),
    }
    save_file(dict(lies[change](*item) for item in kept.items()), folder / "hf-kept.safetensors")
    try:
        transcoder.mcore2hf(folder, tmp_path / "back", sync=False)
    except InputError as error:
        assert any(problem.file == "hf-kept.safetensors" or problem.tensor in kept for problem in error.problems)
    else:
        check_exported(q.loaded(folder), read(tmp_path / "back"))


def stored_codes(names: Iterable[str], directory: Path) -> dict[str, bytes]:
    """The bytes of some tensors."""
    return {name: read(directory)[name].contiguous().view(torch.uint8).numpy().tobytes() for name in names}


@pytest.mark.parametrize("value", [0.0, float("inf"), float("nan"), -1.0, 1e-45, 3e38])
def test_strange_scales_come_back_or_are_told_of(value: float, tmp_path: Path) -> None:
    tensors = read(q.made(FP8))
    tensors[S] = torch.full_like(tensors[S], value)
    source = q.write_shards(tmp_path / "source", {"model.safetensors": tensors}, read_config(q.made(FP8)))
    try:
        transcoder.roundtrip(source)
        whole = True
    except DifferenceError as error:
        assert [problem for problem in error.problems if problem.tensor.startswith(W)]
        whole = False
    transcoder.hf2mcore(source, tmp_path / "mcore", sync=False)
    report = transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", sync=False, quantize="like-source")
    same = stored_codes((W, S), source) == stored_codes((W, S), tmp_path / "back")
    assert same == whole
    assert same or [text for text in report["warnings"] if text.startswith(W)], "other codes were written silently"
