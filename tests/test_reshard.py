"""Megatron → Megatron gives exactly the files that an import with the new options gives."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import quantised
import torch
import zoo
from command_line import EXAMPLE, succeed, transcode, tree
from naive import loaded
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

import transcoder

GRIDS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "llama": ({"tp": 2, "pp": 2}, {"tp": 1, "pp": 3, "layout": "per-layer"}),
    "llama-tied": ({"tp": 1}, {"tp": 2, "layout": "singleton", "dtype": "float32"}),
    "qwen3-moe": ({"ep": 2, "tp": 2}, {"etp": 2, "tp": 2, "layout": "singleton", "norm_names": "local"}),
    "deepseek-v3-mtp": ({"ep": 2, "tp": 2, "pp": 2}, {"tp": 1, "norm_names": "te"}),
    "gemma2": ({"tp": 2}, {"pp": 2, "layout": "per-layer"}),
    "gpt-oss": ({"ep": 2, "tp": 2}, {"ep": 4, "layout": "per-layer"}),
    "qwen2.5-vl": ({"tp": 1}, {"tp": 2, "layout": "per-layer"}),
    "nemotron-h": ({"tp": 2}, {"pp": 2}),
}


@pytest.mark.parametrize("kind", GRIDS)
def test_a_resharded_checkpoint_is_the_one_that_an_import_makes(tmp_path: Path, kind: str) -> None:
    before, after = GRIDS[kind]
    transcoder.hf2mcore(zoo.made(kind), tmp_path / "one", **before)
    transcoder.reshard(tmp_path / "one", tmp_path / "two", verify=True, **after)
    transcoder.hf2mcore(zoo.made(kind), tmp_path / "wanted", **after)
    assert tree(tmp_path / "two") == tree(tmp_path / "wanted")
    assert not (tmp_path / "two.partial").exists()


@pytest.mark.parametrize("kind", quantised.KINDS[:3])
def test_what_was_kept_of_a_quantised_original_travels_on(tmp_path: Path, kind: str) -> None:
    source = quantised.made(kind)
    transcoder.hf2mcore(source, tmp_path / "one")
    transcoder.reshard(tmp_path / "one", tmp_path / "two", tp=2)
    transcoder.check(tmp_path / "two")
    transcoder.mcore2hf(tmp_path / "two", tmp_path / "back", quantize="like-source")
    assert tree(tmp_path / "back") == tree(source)


def test_a_checkpoint_without_manifest_and_config_needs_the_class(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "one", tp=2)
    iteration = tmp_path / "one" / "iter_0000000"
    shutil.rmtree(iteration / "hf")
    (iteration / "transcode-manifest.json").unlink()
    refused = transcode("reshard", tmp_path / "one", tmp_path / "two", "--tp", 4)
    assert (refused.code, "--arch" in refused.err) == (3, True), refused.err
    succeed("reshard", tmp_path / "one", tmp_path / "two", "--tp", 4, "--arch", "LlamaForCausalLM")
    transcoder.check(tmp_path / "two")
    transcoder.mcore2hf(tmp_path / "two", tmp_path / "back", hf_model=EXAMPLE)
    assert tree(tmp_path / "back") == tree(EXAMPLE)


def test_the_arguments_of_a_newer_store_become_common_pt_and_objects_are_added(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "one", tp=2)
    transcoder.hf2mcore(EXAMPLE, tmp_path / "wanted", tp=4)
    old, new = tmp_path / "one" / "iter_0000000", tmp_path / "newer" / "iter_0000000"
    common = {"common_state/shard_0_1": [torch.load(old / "common.pt", weights_only=False)]}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({**loaded(tmp_path / "one"), **common}, checkpoint_id=new, no_dist=True, planner=planner)
    shutil.copy(old / "metadata.json", new)
    assert not any("_extra_state" in key for key in dcp.FileSystemReader(new).read_metadata().state_dict_metadata)
    transcoder.reshard(tmp_path / "newer", tmp_path / "two", tp=4, arch="LlamaForCausalLM")
    found, wanted = tree(tmp_path / "two"), tree(tmp_path / "wanted")
    names = {name for name in wanted if name.endswith((".distcp", ".metadata", "common.pt"))}
    assert len(names) > 5 and {name: found[name] for name in names} == {name: wanted[name] for name in names}


def test_an_interrupted_reshard_goes_on(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "one", tp=2)
    transcoder.reshard(tmp_path / "one", tmp_path / "wanted", tp=4)
    moved: list[int] = []

    def stop(progress: Any) -> None:
        moved.append(progress.bytes_done)
        if len(moved) == 25:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        transcoder.reshard(tmp_path / "one", tmp_path / "two", tp=4, workers=1, progress=stop)
    assert not (tmp_path / "two").exists() and (tmp_path / "two.partial" / "journal").exists()
    transcoder.reshard(tmp_path / "one", tmp_path / "two", tp=4, resume=True)
    assert tree(tmp_path / "two") == tree(tmp_path / "wanted")


def test_damage_of_the_source_is_refused(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "one")
    payload = tmp_path / "one" / "iter_0000000" / "__0_1.distcp"
    data = bytearray(payload.read_bytes())
    data[len(data) // 2] ^= 1
    payload.write_bytes(data)
    refused = transcode("reshard", tmp_path / "one", tmp_path / "two", "--tp", 2)
    assert (refused.code, "checksum" in refused.err) == (3, True), refused.err
    assert not (tmp_path / "two").exists()


def test_linked_files_share_their_blocks(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "one", tp=2)
    succeed("reshard", tmp_path / "one", tmp_path / "two", "--link", "--tp", 2, "--iteration", 7, "--verify")
    old, new = tmp_path / "one" / "iter_0000000", tmp_path / "two" / "iter_0000007"
    names = sorted(path.name for path in old.glob("*.distcp"))
    assert names == sorted(path.name for path in new.glob("*.distcp"))
    assert all((old / name).stat().st_ino == (new / name).stat().st_ino for name in names)
    transcoder.check(tmp_path / "two")
    transcoder.mcore2hf(tmp_path / "two", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(EXAMPLE)


def test_linked_files_get_other_names_for_norms(tmp_path: Path) -> None:
    transcoder.hf2mcore(zoo.made("qwen3-moe"), tmp_path / "one", ep=2, norm_names="local")
    transcoder.reshard(tmp_path / "one", tmp_path / "two", link=True, norm_names="te", ep=2)
    transcoder.check(tmp_path / "two")
    keys = transcoder.open_checkpoint(tmp_path / "two")
    assert keys.keys() != transcoder.open_checkpoint(tmp_path / "one").keys()
    assert any(key.endswith("layer_norm_weight") for key in keys)
    transcoder.mcore2hf(tmp_path / "two", tmp_path / "back")
    assert tree(tmp_path / "back") == tree(zoo.made("qwen3-moe"))


@pytest.mark.parametrize("option", [{"dtype": "float32"}, {"layout": "per-layer"}])
def test_bytes_that_would_change_are_not_linked(tmp_path: Path, option: dict[str, str]) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "one")
    words = [f"--{name}={value}" for name, value in option.items()]
    refused = transcode("reshard", tmp_path / "one", tmp_path / "two", "--link", *words)
    assert (refused.code, "--link" in refused.err) == (2, True), refused.err
    assert not (tmp_path / "two").exists()


def test_norms_that_are_stored_less_one_are_shifted_anew_in_a_wider_type(tmp_path: Path) -> None:
    source = zoo.save("qwen3-next", tmp_path / "source", shards=2)
    transcoder.hf2mcore(source, tmp_path / "narrow", tp=1, sync=False)
    transcoder.hf2mcore(source, tmp_path / "wide", tp=1, dtype="float32", sync=False)
    transcoder.reshard(tmp_path / "narrow", tmp_path / "made", dtype="float32", sync=False)
    assert tree(tmp_path / "made") == tree(tmp_path / "wide")
    transcoder.mcore2hf(tmp_path / "made", tmp_path / "back", dtype="bfloat16", sync=False)
    assert tree(tmp_path / "back") == tree(source)
