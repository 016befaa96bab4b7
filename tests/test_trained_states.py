"""What megatron-core's own trainer leaves on the disk, optimizer and all, becomes the live model's weights."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from random import Random
from typing import Any
from zlib import crc32

import pytest
import torch

import transcoder
from transcoder.formats.archive import read_archive
from transcoder.formats.zips import Entry
from transcoder.planning import plan_mcore2hf

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from harness import launch
from trained import DENSE, SPARSE, TRAINER, architecture, assert_trained, case

Case = dict[str, Any]
Trained = Callable[[str], Case]


def cases(root: Path) -> dict[str, Case]:
    """Every way in which megatron-core 0.16.1 shards an optimizer's state, every grid of two ranks; and rank files."""
    legacy = {"format": "torch"}
    found = (  # those of one grid together
        case(root, "dp", DENSE | {"mtp_num_layers": 1}, "fully_reshardable"),
        case(root, "tp", DENSE, "fully_reshardable", tp=2),
        case(root, "ranks tp", DENSE, "fully_reshardable", tp=2, **legacy),
        case(root, "uneven", DENSE, "dp_reshardable", pp=2, first=1, tied=True),
        case(root, "plain", SPARSE, "", pp=2, first=2),
        case(root, "ranks uneven", DENSE, "fully_reshardable", pp=2, first=1, tied=True, **legacy),
        case(root, "vpp", DENSE | {"num_layers": 4}, "dp_zero_gather_scatter", pp=2, vpp=2),
        case(root, "ranks vpp", DENSE | {"num_layers": 4}, "", pp=2, vpp=2, **legacy),
        case(root, "experts", SPARSE, "dp_reshardable", ep=2),
        case(root, "ranks experts", SPARSE, "fully_reshardable", ep=2, **legacy),
        case(root, "ranks both", SPARSE, "", tp=2, ep=2, etp=1, steps=0, **legacy),
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
    assert any("10 keys mtp.*" in text and "unknown to recipe llama" in text for text in report["warnings"])


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


LEGACY = ("ranks tp", "ranks uneven", "ranks vpp", "ranks experts", "ranks both")


@pytest.mark.parametrize("name", LEGACY)
def test_rank_files_are_exported_and_become_a_distributed_checkpoint(
    trained: Trained, tmp_path: Path, name: str
) -> None:
    one = trained(name)
    report = exported(one, tmp_path / "hf")
    assert_trained(one, tmp_path / "hf")
    assert {row["prefix"] for row in report["left_out"]} >= {"model_optim_rng.pt"}
    transcoder.reshard(one["out"], tmp_path / "mcore", pp=2, arch=architecture(one), sync=False)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", arch=architecture(one), sync=False)
    assert_trained(one, tmp_path / "back")


def test_rank_files_are_inspected_and_checked(trained: Trained, tmp_path: Path) -> None:
    one = trained("ranks experts")
    found = transcoder.inspect(one["out"])
    rows = {row["key"]: row for row in found["keys"]}
    assert found["format"] == "torch" and found["parallel"] == {"tp": 1, "pp": 1, "ep": 2, "etp": 1, "ranks": 2}
    assert rows["decoder.layers.2.mlp.experts.experts.linear_fc1.weight"]["shape"] == [4, 48, 32]
    assert transcoder.check(one["out"])["checked"]["checksums"] > 20
    shutil.copytree(one["out"], tmp_path / "damaged")
    file = tmp_path / "damaged" / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(transcoder.DifferenceError, match="mp_rank_00_001"):
        transcoder.check(tmp_path / "damaged")


def changed_ranks(source: Case, target: Path, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Path:
    """A copy in which the state of every rank was changed."""
    shutil.copytree(source["out"], target)
    for file in target.glob("iter_*/mp_rank_*/model_optim_rng.pt"):
        torch.save(change(torch.load(file, weights_only=False)), file)
    return target


def as_transformer_engine(state: dict[str, Any]) -> dict[str, Any]:
    """The names that Transformer Engine's modules give the same tensors, experts grouped."""
    names = (
        (r"layers\.(\d+)\.input_layernorm\.", r"layers.\1.self_attention.linear_qkv.layer_norm_"),
        (r"local_experts\.(\d+)\.(linear_fc[12])\.weight", r"\2.weight\1"),
    )
    for pattern, text in names:
        state["model"] = {re.sub(pattern, text, name): value for name, value in state["model"].items()}
    state["model"]["decoder.layers.0.mlp.experts.linear_fc1._extra_state"] = torch.empty(0, dtype=torch.uint8)
    return state


def test_rank_files_with_the_names_of_transformer_engine(trained: Trained, tmp_path: Path) -> None:
    one = trained("ranks experts")
    source = changed_ranks(one, tmp_path / "te", as_transformer_engine)
    transcoder.mcore2hf(source, tmp_path / "hf", arch=architecture(one), sync=False)
    assert_trained(one, tmp_path / "hf")


def test_a_missing_rank_is_named(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained("ranks tp")["out"], tmp_path / "part")
    shutil.rmtree(tmp_path / "part" / "iter_0000002" / "mp_rank_01")
    with pytest.raises(transcoder.InputError, match=r"tp parallel size; expected 2 \(args\); found 1"):
        transcoder.mcore2hf(tmp_path / "part", tmp_path / "hf", arch="LlamaForCausalLM")


def test_a_tensor_that_does_not_fit_its_rank_is_named(trained: Trained, tmp_path: Path) -> None:
    def halve(state: dict[str, Any]) -> dict[str, Any]:
        name = "decoder.layers.1.mlp.linear_fc1.weight"
        return state | {"model": {**state["model"], name: state["model"][name][:20].clone()}}

    source = changed_ranks(trained("ranks tp"), tmp_path / "cut", halve)
    with pytest.raises(transcoder.InputError, match=r"mp_rank_00.*decoder.layers.1.mlp.linear_fc1.weight.*\[20, 32\]"):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")


OLDER = (
    ("self_attention.linear_qkv.", "self_attention.query_key_value."),
    ("self_attention.linear_proj.", "self_attention.dense."),
    ("pre_mlp_layernorm.", "post_attention_norm."), ("input_layernorm.", "input_norm."),
    ("mlp.linear_fc1.", "mlp.dense_h_to_4h."), ("mlp.linear_fc2.", "mlp.dense_4h_to_h."),
    ("final_layernorm.", "final_norm."),
)  # fmt: skip


def before_core(state: dict[str, Any]) -> dict[str, Any]:
    """The same tensors as `megatron/legacy/model/language_model.py` nests and names them."""
    parts: dict[str, dict[str, Any]] = {}
    for name, value in state["model"].items():
        for new, old in OLDER:
            name = name.replace(new, old)
        if name.startswith("decoder."):
            parts.setdefault("encoder", OrderedDict())[name.removeprefix("decoder.")] = value
        elif name.startswith("embedding."):
            parts["embedding"] = {"word_embeddings": OrderedDict(weight=value)}
        elif name.startswith("output_layer.") and "embedding" not in parts and value is not None:
            state["word_embeddings_for_head"] = OrderedDict(weight=value)
        elif value is not None:
            parts["output_layer"] = OrderedDict(weight=value)
    copy = {"word_embeddings_for_head": state.pop("word_embeddings_for_head", None)}
    return state | {"model": {"language_model": parts, **{name: each for name, each in copy.items() if each}}}


@pytest.mark.parametrize("name", ("ranks tp", "ranks uneven"))
def test_the_classes_before_megatron_core_are_read(trained: Trained, tmp_path: Path, name: str) -> None:
    source = changed_ranks(trained(name), tmp_path / "older", before_core)
    transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM", sync=False)
    assert_trained(trained(name), tmp_path / "hf")


def older(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"checkpoint_version": 1.0}


def transposed(state: dict[str, Any]) -> dict[str, Any]:
    return state | {"model": {"decoder.layers.0.mlp.experts.weight1": torch.ones(3, 4)}}


UNREAD = ((older, "checkpoint_version 2.0 or more; found 1.0"), (transposed, "legacy GroupedMLP"))


@pytest.mark.parametrize(("change", "words"), UNREAD)
def test_what_older_releases_wrote_is_recognised(
    trained: Trained, tmp_path: Path, change: Callable[[dict[str, Any]], dict[str, Any]], words: str
) -> None:
    source = changed_ranks(trained("ranks tp"), tmp_path / "older", change)
    with pytest.raises(transcoder.InputError, match=words):
        transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM")


def test_nothing_in_a_rank_file_is_run(trained: Trained, tmp_path: Path) -> None:
    class Run:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was run"),)

    one = trained("ranks tp")
    source = changed_ranks(one, tmp_path / "hostile", lambda state: state | {"rng_state": Run()})
    transcoder.mcore2hf(source, tmp_path / "hf", arch="LlamaForCausalLM", sync=False)
    assert_trained(one, tmp_path / "hf")
    assert not (tmp_path / "was run").exists()


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


def resealed(data: bytes, entry: Entry, pickle: bytes) -> bytes:
    """The archive with another pickle of the same length, its checksum corrected wherever it stands."""
    changed = data[: entry.start] + pickle + data[entry.start + entry.size :]
    return changed.replace(entry.crc.to_bytes(4, "little"), crc32(pickle).to_bytes(4, "little"))


def test_a_changed_pickle_of_a_rank_is_refused_or_means_what_it_says(trained: Trained, tmp_path: Path) -> None:
    shutil.copytree(trained("ranks experts")["out"], tmp_path / "changed")
    file = tmp_path / "changed" / "iter_0000002" / "mp_rank_00_001" / "model_optim_rng.pt"
    data, rng, refused = file.read_bytes(), Random(5), 0
    entry = read_archive(memoryview(data), "good")["data.pkl"]
    good = data[entry.start : entry.start + entry.size]
    for _ in range(60):
        pickle = bytearray(good)
        for place in rng.sample(range(len(good)), rng.choice((1, 2, 5))):
            pickle[place] = rng.randrange(256)
        file.write_bytes(resealed(data, entry, bytes(pickle)))
        try:
            transcoder.inspect(tmp_path / "changed")
            plan_mcore2hf(tmp_path / "changed", arch=architecture(trained("ranks experts")))
        except transcoder.InputError:
            refused += 1
    assert 20 < refused < 60
