"""What megatron-core's own trainer leaves on the disk, optimizer and all, becomes the live model's weights."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

import transcoder

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from harness import launch
from trained import DENSE, SPARSE, TRAINER, architecture, assert_trained, case

Case = dict[str, Any]
Trained = Callable[[str], Case]


def cases(root: Path) -> dict[str, Case]:
    """Every way in which megatron-core 0.16.1 shards an optimizer's state, every grid of two ranks."""
    found = (
        case(root, "tp", DENSE, "fully_reshardable", tp=2),
        case(root, "dp", DENSE | {"mtp_num_layers": 1}, "fully_reshardable"),
        case(root, "uneven", DENSE, "dp_reshardable", pp=2, first=1, tied=True),
        case(root, "vpp", DENSE | {"num_layers": 4}, "dp_zero_gather_scatter", pp=2, vpp=2),
        case(root, "experts", SPARSE, "dp_reshardable", ep=2),
        case(root, "plain", SPARSE, "", pp=2, first=2),
    )
    return {each["name"]: each for each in found}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A case by its name, all of them trained in one launch."""
    root = tmp_path_factory.mktemp("trained")

    @cache
    def every() -> dict[str, Case]:
        found = cases(root)
        launch(list(found.values()), 2, root, worker=TRAINER)
        return found

    return lambda name: every()[name]


def exported(trained: Case, target: Path, **options: Any) -> dict[str, Any]:
    return transcoder.mcore2hf(trained["out"], target, arch=architecture(trained), sync=False, **options)


@pytest.mark.parametrize("name", ("tp", "dp", "uneven", "vpp", "experts", "plain"))
def test_the_trained_weights_are_exported(trained: Trained, tmp_path: Path, name: str) -> None:
    report = exported(trained(name), tmp_path / "hf")
    assert_trained(trained(name), tmp_path / "hf")
    left = {row["prefix"]: row for row in report["left_out"]}
    optimizer = [row for prefix, row in left.items() if prefix.startswith(("optimizer", "chained"))]
    assert sum(row["bytes"] for row in optimizer) > 2 * report["bytes_written"]  # moments and masters in float32
    assert left["rng_state"]["keys"] >= 1
    assert sum("training state and are left out" in text for text in report["warnings"]) == len(left) - ("mtp." in left)
    assert any("padding rows are not zero" in text for text in report["warnings"])


def test_the_layers_that_predict_further_tokens_are_counted_and_named(trained: Trained, tmp_path: Path) -> None:
    report = exported(trained("dp"), tmp_path / "hf")
    (row,) = (row for row in report["left_out"] if row["prefix"] == "mtp.")
    assert row["keys"] == 10 and row["bytes"] > 0
    assert any("10 tensors mtp.*" in text and "recipe llama has no place" in text for text in report["warnings"])


def test_inspect_and_check_name_what_is_no_weight(trained: Trained) -> None:
    found = transcoder.inspect(trained("tp")["out"])
    assert found["parallel"]["tp"] == 2 and found["config"]["num_layers"] == 3
    assert any("keys optimizer.*" in text and "bytes" in text for text in found["warnings"])
    assert not any(row["key"].startswith("optimizer") for row in found["keys"])
    assert transcoder.check(trained("tp")["out"])["checked"]["checksums"] > 0


def test_reshard_carries_the_weights_alone_and_says_so(trained: Trained, tmp_path: Path) -> None:
    one = trained("uneven")
    report = transcoder.reshard(one["out"], tmp_path / "mcore", tp=2, arch=architecture(one), sync=False)
    assert any("keys optimizer.*" in text and "are left out" in text for text in report["warnings"])
    assert {row["prefix"] for row in report["left_out"]} >= {"optimizer.", "rng_state"}
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "hf", arch=architecture(one), sync=False)
    assert_trained(one, tmp_path / "hf")


def altered(source: Case, target: Path, change: Callable[[dict[str, Any]], None]) -> Path:
    """A copy whose common.pt was changed."""
    shutil.copytree(source["out"], target)
    path = target / "iter_0000002" / "common.pt"
    common = torch.load(path, weights_only=False)
    change(common)
    torch.save(common, path)
    return target


def test_the_sizes_come_from_the_shapes_where_no_file_says_them(trained: Trained, tmp_path: Path) -> None:
    one = trained("experts")
    source = altered(one, tmp_path / "bare", lambda common: common.pop("args"))
    transcoder.mcore2hf(source, tmp_path / "hf", arch=architecture(one), sync=False)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    sizes = ("num_attention_heads", "num_key_value_heads", "head_dim", "num_experts", "moe_intermediate_size")
    assert [config[name] for name in sizes] == [4, 2, 12, 4, 24]
    assert (config["vocab_size"], config["tie_word_embeddings"]) == (64, False)
    assert_trained(one, tmp_path / "hf")


def test_what_shapes_cannot_say_is_named(trained: Trained, tmp_path: Path) -> None:
    source = altered(trained("tp"), tmp_path / "bare", lambda common: common.pop("args"))
    with pytest.raises(transcoder.InputError, match="num_attention_heads"):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")


def test_a_conflict_names_both_sides(trained: Trained, tmp_path: Path) -> None:
    source = altered(trained("tp"), tmp_path / "wrong", lambda common: setattr(common["args"], "num_layers", 4))
    with pytest.raises(transcoder.InputError, match=r"num_layers.*4 \(the files\).*3 \(the stored tensors\)"):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")
    (source / "iter_0000002" / "run_config.yaml").write_text("model: {hidden_size: 48}\n")
    with pytest.raises(transcoder.InputError, match=r"hidden_size.*48 \(run_config.yaml\).*32 \(the arguments"):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")


def rewritten(source: Case, target: Path, kept: Callable[[str], bool], **objects: Any) -> Path:
    """A copy of one rank's checkpoint, written by torch itself, with some of its keys and other objects."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
    from torch.distributed.checkpoint.filesystem import FileSystemReader

    folder = Path(source["out"]) / "iter_0000002"
    known = FileSystemReader(folder).read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in known.items()
        if kept(key) and hasattr(value, "size")
    }
    dcp.load(tensors, checkpoint_id=folder, no_dist=True)
    out = target / "iter_0000002"
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save({**tensors, **objects}, checkpoint_id=out, no_dist=True, planner=planner)
    shutil.copy(folder / "metadata.json", out)
    (target / "latest_checkpointed_iteration.txt").write_text("2")
    return target


def test_masters_without_their_model_are_refused(trained: Trained, tmp_path: Path) -> None:
    source = rewritten(trained("tp"), tmp_path / "masters", lambda key: key.startswith("optimizer."))
    with pytest.raises(transcoder.InputError, match=r"holds no weights of a model.*\n.*keys optimizer"):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")


def test_the_arguments_are_found_in_the_store_of_newer_releases(trained: Trained, tmp_path: Path) -> None:
    one = trained("tp")
    common = torch.load(Path(one["out"]) / "iter_0000002" / "common.pt", weights_only=False)
    objects = {"common_state/shard_0_1": [common]}
    source = rewritten(one, tmp_path / "newer", lambda key: not key.startswith("optimizer."), **objects)
    assert not (source / "iter_0000002" / "common.pt").exists()
    transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM", sync=False)
    assert_trained(one, tmp_path / "hf")
    assert transcoder.inspect(source)["config"]["num_attention_heads"] == 4
