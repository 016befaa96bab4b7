"""Damage to the files of a Megatron checkpoint never reaches an export; megatron-core notices little of it."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any
from zlib import crc32

import pytest
import torch
from damage import MANIFEST, flip, hf_names, items, load, payload_of, refusal, store, weights
from hf_models import make_model, read_files

import transcoder
from transcoder import InputError

JSON, TRACKER, STATE = "metadata.json", "latest_checkpointed_iteration.txt", "latest_train_state.pt"


def test_the_undamaged_checkpoint_is_accepted_with_a_plan_that_torch_wrote(good: Path, folder: Path) -> None:
    right = {entry.name: entry.data for entries in read_files(good / "source").values() for entry in entries}
    assert weights(folder) == right
    store(folder, load(folder))
    assert weights(folder) == right


def flipped_payloads(folder: Path) -> Iterator[tuple[str, str]]:
    """Damage one byte of one chunk after the other. Yields its key and file while the damage lasts."""
    for index, info in items(load(folder)):
        start, size = payload_of(folder, info)
        for at in {start, start + size // 2, start + size - 1}:
            flip(folder / info.relative_path, at)
            yield index.fqn, info.relative_path
            flip(folder / info.relative_path, at)


def test_a_flipped_byte_in_any_payload_is_refused_by_its_checksum(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    count = 0
    for key, file in flipped_payloads(folder):
        error = refusal(folder, key)
        assert (error.kind, error.problems[0].file) == ("checksum", file)
        count += 1
    assert count > 100
    assert weights(folder)


def test_a_flipped_byte_in_any_payload_is_refused_beside_a_manifest(good: Path, folder: Path) -> None:
    for key, file in flipped_payloads(folder):
        refusal(folder, key, file, *hf_names(good))
    assert weights(folder)


def test_a_flipped_bit_anywhere_is_refused_or_changes_nothing(good: Path, folder: Path) -> None:
    right = {entry.name: entry.data for entries in read_files(good / "source").values() for entry in entries}
    chosen, refused = random.Random(11), 0
    for path in sorted(path for path in folder.iterdir() if path.is_file()):
        for _ in range(24):
            at, mask = chosen.randrange(path.stat().st_size), 1 << chosen.randrange(8)
            flip(path, at, mask)
            try:
                assert weights(folder) == right, f"bit {mask:#x} of byte {at} of {path.name}"
            except InputError:
                refused += 1
            flip(path, at, mask)
    assert refused > 100


def test_a_changed_payload_with_a_right_checksum_is_refused_by_the_manifest(folder: Path) -> None:
    info = next(info for index, info in items(load(folder)) if index.fqn.endswith("linear_fc2.weight"))
    path, (start, size) = folder / info.relative_path, payload_of(folder, info)
    data = path.read_bytes()
    new = bytes([data[start] ^ 1]) + data[start + 1 : start + size]
    before, after = (crc32(part).to_bytes(4, "little") for part in (data[start : start + size], new))
    end = info.offset + info.length
    path.write_bytes(data[:start] + new + data[start + size : end].replace(before, after) + data[end:])
    refusal(folder, *(f"model.layers.{layer}.mlp.down_proj.weight" for layer in range(3)))
    (folder / MANIFEST).unlink()
    assert weights(folder), "training may change values: without a manifest the checksum decides"


@pytest.mark.parametrize("left", [0, 1, 0.5, 0.999])
def test_a_cut_payload_file_is_refused(folder: Path, left: float) -> None:
    for path in sorted(folder.glob("*.distcp")):
        data = path.read_bytes()
        path.write_bytes(data[: int(len(data) * left) if left < 1 else -1])
        refusal(folder, path.name)
        path.write_bytes(data)


def test_a_missing_payload_file_is_refused(folder: Path) -> None:
    names = sorted(path.name for path in folder.glob("*.distcp"))
    assert len(names) == 8
    for name in names:
        (folder / name).rename(folder / "away")
        refusal(folder, name)
        (folder / "away").rename(folder / name)


def test_payload_files_that_changed_places_are_refused(folder: Path) -> None:
    for one, two in combinations(sorted(folder.glob("*.distcp")), 2):
        first, second = one.read_bytes(), two.read_bytes()
        one.write_bytes(second), two.write_bytes(first)
        refusal(folder, one.name, two.name)
        one.write_bytes(first), two.write_bytes(second)


@pytest.mark.parametrize("backend", ["zarr", "fsdp_dtensor", "torch", "", None, 1, ["torch_dist"], {}])
def test_another_backend_is_refused(folder: Path, backend: Any) -> None:
    (folder / JSON).write_text(json.dumps({"sharded_backend": backend, "sharded_backend_version": 1}))
    assert refusal(folder, JSON).kind == "format"


@pytest.mark.parametrize(
    "text", ["[]", '"torch_dist"', "1", "", "{", '{"sharded_backend": "torch_dist"', "\x00", '{"a": 1, "a": 2}', "NaN"]
)
def test_a_damaged_backend_file_is_refused(folder: Path, text: str) -> None:
    (folder / JSON).write_text(text)
    refusal(folder, JSON)


@pytest.mark.parametrize("text", ["7", "iter_0000000", "-1", "", "0x0", "release/", "../mcore", "9" * 60, "١"])
def test_a_tracker_that_names_no_iteration_is_refused(folder: Path, text: str) -> None:
    (folder.parent / TRACKER).write_text(text)
    refusal(folder.parent, TRACKER)


@pytest.mark.parametrize(("text", "step"), [("0", 3), ("3", 0), ("3", 7), ("release", 3)])
def test_trackers_that_disagree_are_refused_naming_both(folder: Path, text: str, step: int) -> None:
    shutil.copytree(folder, folder.parent / "iter_0000003")
    _set_step(folder.parent, step)
    (folder.parent / TRACKER).write_text(text)
    error = refusal(folder.parent, TRACKER)
    assert STATE in str(error) and text in str(error) and str(step) in str(error)


def _set_step(checkpoint: Path, step: int) -> None:
    state = torch.load(checkpoint / STATE)
    state["step"] = torch.tensor(step, dtype=torch.int32)
    torch.save(state, checkpoint / STATE)


def test_trackers_that_agree_on_a_later_iteration_are_followed(folder: Path) -> None:
    folder.rename(folder.parent / "iter_0000003")
    _set_step(folder.parent, 3)
    (folder.parent / TRACKER).write_text("3")
    assert len(weights(folder.parent)) == 30


def test_a_manifest_with_one_changed_byte_is_refused(folder: Path) -> None:
    size, chosen = (folder / MANIFEST).stat().st_size, random.Random(5)
    for at in [0, size // 2, size - 1, *(chosen.randrange(size) for _ in range(60))]:
        flip(folder / MANIFEST, at)
        refusal(folder, MANIFEST)
        flip(folder / MANIFEST, at)
    assert weights(folder)


def test_a_manifest_of_another_checkpoint_is_refused(good: Path, folder: Path, tmp_path: Path) -> None:
    make_model("llama", tmp_path / "other", seed=8)
    transcoder.hf2mcore(tmp_path / "other", tmp_path / "two", tp=2, pp=2, sync=False)
    shutil.copy(tmp_path / "two" / "iter_0000000" / MANIFEST, folder / MANIFEST)
    refusal(folder, MANIFEST, *hf_names(good))


@pytest.mark.parametrize("more", [b"\0", b"PK\5\6", bytes(4096)])
def test_a_payload_file_with_more_bytes_than_the_manifest_says_is_refused(folder: Path, more: bytes) -> None:
    for path in sorted(folder.glob("*.distcp")):
        data = path.read_bytes()
        path.write_bytes(data + more)
        refusal(folder, path.name)
        path.write_bytes(data)


def test_a_changed_side_file_is_refused_unless_another_model_supplies_it(good: Path, folder: Path) -> None:
    config = folder / "hf" / "config.json"
    config.write_bytes(config.read_bytes() + b" ")
    refusal(folder, "hf/config.json")
    out = folder.parent / "out"
    transcoder.mcore2hf(folder, out, hf_model=good / "source")
    assert (out / "config.json").read_bytes() == (good / "source" / "config.json").read_bytes()


def test_rope_theta_that_is_no_number_is_refused(tmp_path: Path) -> None:
    source = make_model("llama", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for value in ("x", [1], {"a": 1}, True, -1, 10**400):
        (source / "config.json").write_text(json.dumps({**config, "rope_theta": value}))
        with pytest.raises(InputError, match="rope_theta"):
            transcoder.hf2mcore(source, tmp_path / "out")
        assert not (tmp_path / "out").exists()
