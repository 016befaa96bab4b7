"""Layers for multi-token prediction: kept, dropped or absent; and tensors that repeat others."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import quantised as q
import torch
from command_line import names, succeed, transcode
from zoo import Change, changed, made, read, read_config
from zoo_numbers import Config, Tensors

import transcoder
from transcoder import InputError, UsageError

MTP = ("deepseek-v3-mtp", "glm4-moe-mtp", "qwen3-next-mtp", "deepseek-v3-fp8")
COUNTED_ON = ("deepseek-v3-mtp", "glm4-moe-mtp")  # its layers have the decoder's names and numbers after them
COPIES = {
    "model.layers.3.embed_tokens.weight": "model.embed_tokens.weight",
    "model.layers.3.shared_head.head.weight": "lm_head.weight",
}


def extra(kind: str) -> list[str]:
    """The files' tensors for multi-token prediction, quantised ones as their weights."""
    config = read_config(made(kind))
    start = f"model.layers.{config['num_hidden_layers']}."
    return [name for name in q.decoded(read(made(kind))) if name.startswith((start, "mtp."))]


def copy_of(kind: str, place: Path, change: Change | None = None) -> Path:
    """A model of one's own, changed."""
    source = Path(shutil.copytree(made(kind), place))
    if change is not None:
        changed(source, change)
    return source


def without(kind: str) -> Change:
    """No tensor for multi-token prediction; the config stays."""
    start = tuple(extra(kind))
    return lambda tensors, _: {name: tensor for name, tensor in tensors.items() if not name.startswith(start)}


@pytest.mark.parametrize("kind", MTP)
def test_dropped_layers_are_counted_and_gone(kind: str, tmp_path: Path) -> None:
    report = transcoder.hf2mcore(made(kind), tmp_path / "mcore", mtp="drop", verify=True, sync=False)
    told = [text for text in report["warnings"] if "multi-token prediction" in text]
    assert len(told) == 1 and re.findall(r"\d+", told[0]) == [str(len(extra(kind)))]
    whole, less = q.imported(made(kind), tmp_path / "whole"), tmp_path / "mcore" / "iter_0000000"
    kept = {key: tensor for key, tensor in q.loaded(whole).items() if not key.startswith("mtp.")}
    found = q.loaded(less)
    assert found.keys() == kept.keys() and all(torch.equal(found[key], kept[key]) for key in kept)
    assert b"mtp." in (whole / ".metadata").read_bytes() and b"mtp." not in (less / ".metadata").read_bytes()


@pytest.mark.parametrize("kind", MTP)
def test_an_export_after_dropping_fits_itself(kind: str, tmp_path: Path) -> None:
    transcoder.hf2mcore(made(kind), tmp_path / "mcore", mtp="drop", tp=2, sync=False)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", max_shard_size=100_000, verify=True, sync=False)
    back, wanted = read(tmp_path / "back"), q.decoded(read(made(kind)))
    assert back.keys() == wanted.keys() - set(extra(kind))
    assert all(back[name].dtype == wanted[name].dtype and torch.equal(back[name], wanted[name]) for name in back)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == back.keys() and set(index["weight_map"].values()) <= set(
        names(tmp_path / "back")
    )
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in back.values())
    said = q.plain_config(made(kind))
    expected = {**said, "num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in said else said
    assert read_config(tmp_path / "back") == expected
    transcoder.hf2mcore(tmp_path / "back", tmp_path / "again", sync=False)
    transcoder.mcore2hf(tmp_path / "again", tmp_path / "same", sync=False)
    assert q.contents(tmp_path / "same") == q.contents(tmp_path / "back")


@pytest.mark.parametrize("kind", ["deepseek-v3", "qwen3-moe"])
def test_nothing_is_dropped_where_there_is_nothing(kind: str, tmp_path: Path) -> None:
    report = transcoder.hf2mcore(made(kind), tmp_path / "mcore", mtp="drop", sync=False)
    assert not [text for text in report["warnings"] if "multi-token" in text]
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", sync=False)
    assert q.contents(tmp_path / "back") == q.contents(made(kind))


def test_small_numbers_again_after_dropping(tmp_path: Path) -> None:
    transcoder.hf2mcore(made("deepseek-v3-fp8"), tmp_path / "mcore", mtp="drop", sync=False)
    try:
        transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", quantize="like-source", sync=False)
    except InputError as error:
        assert error.problems and not (tmp_path / "back").exists(), "a refusal names what does not fit"
    else:
        back, source = read(tmp_path / "back"), read(made("deepseek-v3-fp8"))
        start = f"model.layers.{read_config(made('deepseek-v3-fp8'))['num_hidden_layers']}."
        assert back.keys() == {name for name in source if not name.startswith(start)}
        assert all(torch.equal(back[name].view(torch.uint8), source[name].view(torch.uint8)) for name in back)


def test_the_command_drops_layers_and_a_round_trip_does_not(tmp_path: Path) -> None:
    done = succeed("hf2mcore", made("glm4-moe-mtp"), tmp_path / "mcore", "--mtp", "drop", "--json")
    count = str(len(extra("glm4-moe-mtp")))
    assert [text for text in done.report["warnings"] if "multi-token" in text and count in text]
    refusal = transcode("roundtrip", made("glm4-moe-mtp"), tmp_path / "back", "--mtp", "drop", "--json")
    assert refusal.code == 2 and not (tmp_path / "back").exists()
    with pytest.raises(UsageError):
        transcoder.roundtrip(made("glm4-moe-mtp"), mtp="drop")
    assert transcode("hf2mcore", made("glm4-moe-mtp"), tmp_path / "b", "--mtp", "some").code == 2


@pytest.mark.parametrize("mtp", ["", "no", "DROP"])
def test_another_word_than_keep_or_drop_is_refused(mtp: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        transcoder.hf2mcore(made("glm4-moe-mtp"), tmp_path / "mcore", mtp=mtp, sync=False)
    assert not (tmp_path / "mcore").exists()


@pytest.mark.parametrize("kind", MTP)
def test_files_that_lack_the_promised_layers_come_back_unchanged(kind: str, tmp_path: Path) -> None:
    source, like = copy_of(kind, tmp_path / "source", without(kind)), {}
    if "fp8" in kind:
        like = {"quantize": "like-source"}
    assert not set(extra(kind)) & read(source).keys() and read_config(source) == read_config(made(kind))
    transcoder.roundtrip(source, tmp_path / "memory", sync=False)
    folder = q.imported(source, tmp_path / "mcore", pp=2)
    assert not [key for key in q.loaded(folder) if key.startswith("mtp.")]
    transcoder.mcore2hf(folder, tmp_path / "back", sync=False, **like)
    assert q.contents(tmp_path / "back") == q.contents(source) == q.contents(tmp_path / "memory" / "source")


@pytest.mark.parametrize("kind", COUNTED_ON)
@pytest.mark.parametrize("count", [0, 2, None])
def test_a_config_that_tells_another_number_of_layers_is_refused(kind: str, count: int | None, tmp_path: Path) -> None:
    source = copy_of(kind, tmp_path / "source", lambda t, c: c.update(num_nextn_predict_layers=count) or t)
    error = q.refused(source, tmp_path / "place")
    wanted = "num_nextn_predict_layers" if not count else "model.layers.4.eh_proj.weight"
    named = {problem.tensor for problem in error.problems}
    assert wanted in str(error) or wanted in named or named & set(extra(kind)), error
    assert "Traceback" not in transcode("plan", source).err


@pytest.mark.parametrize("kind", COUNTED_ON)
def test_a_layer_of_which_a_part_is_missing_is_refused_by_name(kind: str, tmp_path: Path) -> None:
    for number, name in enumerate(n for n in extra(kind) if not n.endswith("proj.weight") or "eh_proj" in n):
        source = copy_of(
            kind, tmp_path / str(number), lambda t, _, name=name: {n: v for n, v in t.items() if n != name}
        )
        error = q.refused(source, tmp_path / f"place{number}")
        named = {problem.tensor for problem in error.problems}
        assert name in named or set(extra(kind)) - {name} <= named, name


# Tensors that repeat others


@pytest.mark.parametrize("kind", COUNTED_ON)
@pytest.mark.parametrize("copy", COPIES)
@pytest.mark.parametrize("place", [0, -1])
def test_a_copy_that_differs_is_refused_with_both_names(kind: str, copy: str, place: int, tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        tensors[copy].view(torch.int16).view(-1)[place] ^= 1
        return tensors

    source = copy_of(kind, tmp_path / "source", change)
    for options in ({}, {"workers": 3, "tp": 2, "pp": 2}, {"dtype": "float32"}):
        error = q.refused(source, tmp_path / f"place{len(options)}", **options)
        assert [row.tensor for row in error.problems] == [copy] and COPIES[copy] in str(error)
    with pytest.raises(InputError, match=re.escape(COPIES[copy])):
        transcoder.roundtrip(source, tmp_path / "back", sync=False)
    assert not names(tmp_path / "back")
    transcoder.hf2mcore(source, tmp_path / "mcore", mtp="drop", sync=False)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "less", sync=False)
    assert torch.equal(read(tmp_path / "less")[COPIES[copy]], read(made(kind))[COPIES[copy]])


def test_both_copies_that_differ_are_told_at_once(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        return {name: -tensor if name in COPIES else tensor for name, tensor in tensors.items()}

    error = q.refused(copy_of("deepseek-v3-mtp", tmp_path / "source", change), tmp_path / "place")
    assert {problem.tensor for problem in error.problems} == set(COPIES)


def test_a_copy_of_zero_with_another_sign_differs(tmp_path: Path) -> None:
    def change(tensors: Tensors, _: Config) -> Tensors:
        for name in ("lm_head.weight", "model.layers.3.shared_head.head.weight"):
            tensors[name][5, 7] = 0.0 if name == "lm_head.weight" else -0.0
        return tensors

    error = q.refused(copy_of("deepseek-v3-mtp", tmp_path / "source", change), tmp_path / "place")
    assert [problem.tensor for problem in error.problems] == ["model.layers.3.shared_head.head.weight"]


@pytest.mark.parametrize("kind", COUNTED_ON)
def test_copies_are_written_again_into_new_files(kind: str, tmp_path: Path) -> None:
    folder = q.imported(made(kind), tmp_path / "mcore", tp=2)
    (folder / "transcode-manifest.json").unlink()
    transcoder.mcore2hf(folder, tmp_path / "back", verify=True, sync=False, max_shard_size="60KB")
    back, source = read(tmp_path / "back"), read(made(kind))
    assert back.keys() == source.keys() and all(torch.equal(back[name], source[name]) for name in source)


@pytest.mark.parametrize("kind", COUNTED_ON)
def test_a_tied_head_beside_a_copy_of_it_is_refused_or_comes_back(kind: str, tmp_path: Path) -> None:
    def change(tensors: Tensors, config: Config) -> Tensors:
        config["tie_word_embeddings"] = True
        head = tensors["model.embed_tokens.weight"].clone()
        copied = {**tensors, "model.layers.3.shared_head.head.weight": head}
        return {name: tensor for name, tensor in copied.items() if name != "lm_head.weight"}

    source = copy_of(kind, tmp_path / "source", change)
    try:
        transcoder.roundtrip(source, tmp_path / "back", sync=False)
    except InputError as error:
        assert "lm_head.weight" in str(error) or "shared_head.head" in str(error), error
    else:
        assert q.contents(tmp_path / "back" / "source") == q.contents(source)
