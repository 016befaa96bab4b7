"""Plans are what runs then do; checks find damage; comparisons say where and by how much; round trips compare bits."""

from __future__ import annotations

import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import EXAMPLE, flip, names, succeed, transcode, tree

import transcoder
from transcoder.iterations import TEXT_TRACKER

MANIFEST = "transcode-manifest.json"
WEIGHT = "model.layers.1.mlp.down_proj.weight"


# --- plans ---


def _payloads(folder: Path, pattern: str) -> dict[str, int]:
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in sorted(folder.rglob(pattern))}


@pytest.mark.parametrize("options", [[], ["--tp", 2, "--pp", 2], ["--dtype", "float32", "--iteration", 9]])
def test_the_plan_of_an_import_is_what_the_run_writes(tmp_path: Path, options: list[Any]) -> None:
    line = ["hf2mcore", EXAMPLE, "mcore", *options, "--json"]
    dry = succeed(*line, "--dry-run", cwd=tmp_path).report["plan"]
    assert succeed("plan", EXAMPLE, *options, "--json", cwd=tmp_path).report["plan"] == dry
    assert names(tmp_path) == []
    report = succeed(*line, cwd=tmp_path).report
    files = {row["name"]: row["bytes"] for row in dry["files"]}
    assert files == _payloads(tmp_path / "mcore", "*.distcp")
    assert sum(files.values()) == report["bytes_written"]
    assert sum(row["bytes"] for row in dry["rules"]) == 1_000_576 * (4 if "float32" in options else 2)
    keys = succeed("inspect", "mcore", "--json", cwd=tmp_path).report["keys"]
    planned = {row["target"][0].split()[0]: row["cuts"][0] for row in dry["rules"]}
    assert planned == {row["key"]: row["grid"] for row in keys}


@pytest.mark.parametrize("options", [[], ["--dtype", "float32", "--max-shard-size", "1MB"]])
def test_the_plan_of_an_export_is_what_the_run_writes(tmp_path: Path, mcore: Path, options: list[Any]) -> None:
    line = ["mcore2hf", mcore, "hf", *options, "--json"]
    dry = succeed(*line, "--dry-run", cwd=tmp_path).report["plan"]
    assert succeed("plan", mcore, *options, "--json", cwd=tmp_path).report["plan"] == dry
    assert names(tmp_path) == []
    succeed(*line, cwd=tmp_path)
    assert {row["name"]: row["bytes"] for row in dry["files"]} == _payloads(tmp_path / "hf", "*.safetensors")
    assert {row["codec"] for row in dry["rules"]} == ({"cast bfloat16 to float32"} if options else {"copy"})


def test_a_plan_in_words_names_rules_files_and_memory(tmp_path: Path) -> None:
    text = succeed("plan", EXAMPLE, "--tp", 2).out
    assert "model.layers.{l}.mlp.down_proj.weight" in text
    assert "decoder.layers.mlp.linear_fc2.weight" in text
    assert "iter_0000000/__1_0.distcp" in text
    assert "peak memory at most 160 MiB" in text
    assert succeed("hf2mcore", EXAMPLE, tmp_path / "new", "--tp", 2, "--dry-run").out == text
    assert names(tmp_path) == []


# --- check ---


def _flip_payload(iteration: Path) -> str:
    chunk = transcoder.open_checkpoint(iteration)["decoder.layers.mlp.linear_fc2.weight"].chunks[1]
    flip(iteration / chunk.file, chunk.offset + 10)
    return chunk.file


def _remove(name: str) -> Callable[[Path], str]:
    return lambda iteration: ((iteration / name).unlink(), name)[1]


def _append(name: str) -> Callable[[Path], str]:
    return lambda iteration: ((iteration / name).write_bytes((iteration / name).read_bytes() + b" "), name)[1]


def _flip_in(name: str, place: int) -> Callable[[Path], str]:
    return lambda iteration: (flip(iteration / name, place), name)[1]


DAMAGE: dict[str, tuple[Callable[[Path], str], bool]] = {  # what is done; whether --quick sees it
    "a payload bit": (_flip_payload, False),
    "a payload file is gone": (_remove("__0_1.distcp"), True),
    "a payload file is longer": (_append("__0_0.distcp"), True),
    "a side file is gone": (_remove("hf/LICENSE"), True),
    "a side file is longer": (_append("tokenizer/tokenizer.json"), True),
    "a bit of a side file": (_flip_in("hf/tokenizer.json", 100), True),
    "a bit of the arguments": (_flip_in("common.pt", 700), True),
    "a bit of the YAML": (_flip_in("run_config.yaml", 50), True),
    "a bit of the manifest": (_flip_in(MANIFEST, 500), True),
    "a tracker is longer": (_append("../latest_checkpointed_iteration.txt"), True),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_check_finds_damage_and_names_the_file(own: Path, damage: str) -> None:
    work, quick_sees = DAMAGE[damage]
    file = work(own / "iter_0000000")
    found = transcode("check", own / "iter_0000000")
    assert (found.code, file in found.err) == (5, True), found.err
    quick = transcode("check", own / "iter_0000000", "--quick")
    assert quick.code == (5 if quick_sees else 0), quick.err


def test_check_finds_a_flipped_bit_of_the_framing(own: Path) -> None:
    file = _flip_in("__0_1.distcp", -1)(own / "iter_0000000")
    found = transcode("check", own)
    assert (found.code, file in found.err) == (5, True), found.err


def test_a_part_of_the_payloads_can_be_checked(own: Path) -> None:
    counts = [
        succeed("check", own, "--sample", percent, "--json").report["checked"]["checksums"] for percent in (0, 50, 100)
    ]
    assert counts[0] == 0 < counts[1] < counts[2] == 31


def test_a_tracker_that_training_moved_on_is_no_damage(own: Path) -> None:
    (own / TEXT_TRACKER).write_text("100")
    succeed("check", own / "iter_0000000")


# --- verify ---


def _place(source: Path, name: str, index: tuple[int, int]) -> tuple[Path, int]:
    spec = transcoder.open_checkpoint(source)[name]
    chunk = spec.chunks[0]
    return source / chunk.file, chunk.offset + 2 * (index[0] * spec.shape[1] + index[1])


def _put(source: Path, name: str, index: tuple[int, int], value: float) -> float:
    """Set one bfloat16 element of a weight matrix. Returns the old one."""
    path, offset = _place(source, name, index)
    data = bytearray(path.read_bytes())
    (old,) = struct.unpack("<f", b"\0\0" + data[offset : offset + 2])
    data[offset : offset + 2] = struct.pack("<f", value)[2:]
    path.write_bytes(data)
    return float(old)


@pytest.mark.parametrize("turned", [False, True])
def test_verify_says_where_and_by_how_much_one_element_differs(tmp_path: Path, mcore: Path, turned: bool) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    old = _put(source, WEIGHT, (5, 7), 1.5)
    done = transcode("verify", *([mcore, source] if turned else [source, mcore]), "--json")
    assert done.code == 5
    expected = {"tensor": WEIGHT, "first_index": [5, 7], "max_abs": abs(1.5 - old), "count": 1}
    assert done.report["differences"] == [expected]
    assert (done.report["tensors"], done.report["error"]["kind"]) == (39, "difference")
    assert WEIGHT in done.err
    assert "[5, 7]" in done.err


def test_verify_counts_elements_and_lists_every_tensor(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    first, second = "model.embed_tokens.weight", "model.layers.3.self_attn.v_proj.weight"
    gaps = [abs(_put(source, first, index, value) - value) for index, value in [((9, 1), 2.0), ((1000, 127), -4.0)]]
    gap = abs(_put(source, second, (63, 127), 0.25) - 0.25)
    rows = {row.pop("tensor"): row for row in transcode("verify", EXAMPLE, source, "--json").report["differences"]}
    assert rows == {
        first: {"first_index": [9, 1], "max_abs": max(gaps), "count": 2},
        second: {"first_index": [63, 127], "max_abs": gap, "count": 1},
    }


def test_verify_sees_bits_that_are_equal_as_numbers(tmp_path: Path) -> None:
    one, two = (shutil.copytree(EXAMPLE, tmp_path / name) for name in ("one", "two"))
    _put(one, WEIGHT, (0, 0), 0.0)
    _put(two, WEIGHT, (0, 0), -0.0)
    (row,) = transcode("verify", one, two, "--json").report["differences"]
    assert row == {"tensor": WEIGHT, "first_index": [0, 0], "max_abs": 0.0, "count": 1}


def test_equal_checkpoints_of_any_layout_verify(tmp_path: Path, mcore: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "cut", "--tp", 4, "--pp", 2, "--layout", "per-layer")
    for one, two in ((tmp_path / "cut", mcore), (mcore / "iter_0000000", EXAMPLE), (EXAMPLE, tmp_path / "cut")):
        assert "39 tensors are equal bit for bit" in succeed("verify", one, two).out


# --- round trips ---


def test_a_round_trip_without_a_target_writes_nothing(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "model")
    before = tree(tmp_path)
    done = succeed("roundtrip", source, "--tp", 2, "--json", cwd=tmp_path).report
    assert tree(tmp_path) == before
    assert done["bytes_written"] == 0
    assert [row for row in done["verified"] if not row["matches"]] == []
    assert len(done["verified"]) == 39


def test_a_round_trip_writes_below_its_target_under_the_models_name(tmp_path: Path) -> None:
    succeed("roundtrip", EXAMPLE, tmp_path / "out", "--pp", 2)
    assert names(tmp_path) == ["out"]
    assert tree(tmp_path / "out") == {f"{EXAMPLE.name}/{name}": data for name, data in tree(EXAMPLE).items()}
    refused = transcode("roundtrip", "--hf-model-id", EXAMPLE, "--output-dir", tmp_path / "out")
    assert (refused.code, "--overwrite" in refused.err) == (4, True)
    succeed("roundtrip", "--hf_model_id", EXAMPLE, "--output_dir", tmp_path / "out", "--overwrite")


def test_a_round_trip_can_leave_its_megatron_checkpoint(tmp_path: Path) -> None:
    line = ["--megatron-save-path", tmp_path / "mcore", "--tp", 2, "--pp", 2]
    succeed("roundtrip", EXAMPLE, tmp_path / "out", *line)
    succeed("hf2mcore", EXAMPLE, tmp_path / "other", "--tp", 2, "--pp", 2)
    assert tree(tmp_path / "mcore") == tree(tmp_path / "other")
    assert tree(tmp_path / "out" / EXAMPLE.name) == tree(EXAMPLE)


def test_a_round_trip_can_go_through_a_megatron_checkpoint(tmp_path: Path, own: Path) -> None:
    before = tree(own)
    succeed("roundtrip", EXAMPLE, "--megatron-load-path", own)
    succeed("roundtrip", EXAMPLE, tmp_path / "out", "--megatron-load-path", own)
    assert tree(tmp_path / "out" / EXAMPLE.name) == tree(EXAMPLE)
    assert tree(own) == before
    other = shutil.copytree(EXAMPLE, tmp_path / "model")
    _put(other, WEIGHT, (2, 3), 8.0)
    done = transcode("roundtrip", other, "--megatron-load-path", own, "--json")
    assert done.code == 5
    assert [row["tensor"] for row in done.report["differences"]] == [WEIGHT]
