"""Damage of any kind is found by `check`: one byte anywhere, and sums on request."""

from __future__ import annotations

import hashlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import quantised
from command_line import EXAMPLE, succeed, transcode, tree

import transcoder
from transcoder.errors import DifferenceError

POSITIONS = 500  # in each of two checkpoints
TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module", params=["example", "kept"])
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint; one of a quantised model, so that scales are kept beside it."""
    source = EXAMPLE if request.param == "example" else quantised.made(quantised.KINDS[0])
    folder = tmp_path_factory.mktemp("whole") / "mcore"
    transcoder.hf2mcore(source, folder, tp=2, pp=2)
    return folder


def _files(root: Path) -> list[Path]:
    return sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())


def _positions(files: list[Path], number: random.Random) -> Iterator[tuple[Path, int, int]]:
    """File, position and bit: both ends of every file, then as many random places in each."""
    for path in files:
        size = path.stat().st_size
        places = [0, size - 1, *(number.randrange(size) for _ in range(-(-POSITIONS // len(files)) - 2))]
        yield from ((path, place, 1 << number.randrange(8)) for place in places)


def test_one_changed_bit_anywhere_is_found(whole: Path) -> None:
    files = _files(whole)
    assert {path.suffix for path in files} >= {".distcp", ".pt", ".json", ".yaml", ".txt"}
    missed, tried = [], 0
    for path, place, bit in _positions(files, random.Random(7)):
        data = path.read_bytes()
        path.write_bytes(data[:place] + bytes([data[place] ^ bit]) + data[place + 1 :])
        try:
            transcoder.check(whole)
            missed.append((path.name, place, bit))
        except DifferenceError:
            pass
        finally:
            path.write_bytes(data)
        tried += 1
    assert (missed, tried >= POSITIONS) == ([], True)
    transcoder.check(whole)


def test_a_file_that_is_gone_or_cut_is_found(whole: Path) -> None:
    for path in _files(whole):
        data = path.read_bytes()
        for rest in (None, data[:-1], data + b"\0"):
            path.unlink() if rest is None else path.write_bytes(rest)
            if rest is not None or path.name not in (TRACKER, "transcode-manifest.json"):
                with pytest.raises(DifferenceError):
                    transcoder.check(whole)
            path.write_bytes(data)


def test_what_may_be_absent_is_told(whole: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(whole, tmp_path / "copy", symlinks=True)
    (copy / TRACKER).unlink()
    with pytest.raises(DifferenceError, match="damaged"):
        transcoder.check(copy)  # the other tracker is still there
    (copy / "latest_train_state.pt").unlink()
    assert ["the only iteration is taken" in line for line in transcoder.check(copy)["warnings"]] == [True]
    (copy / "iter_0000000" / "transcode-manifest.json").unlink()
    assert "no transcode-manifest.json" in transcoder.check(copy)["warnings"][-1]


def test_sums_of_every_file_are_noted_and_checked(tmp_path: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "m", "--checksums", "sha256", "--verify")
    rows = json.loads((tmp_path / "m" / "iter_0000000" / "transcode-manifest.json").read_text())["files"]
    for row in rows:
        data = (tmp_path / "m" / "iter_0000000" / row["name"]).read_bytes()
        assert row["sha256"] == hashlib.sha256(data).hexdigest()
    assert succeed("check", tmp_path / "m", "--json").report["checked"]["digests"] == len(rows)


def test_an_export_lists_sums_as_sha256sum_does(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "m")
    succeed("mcore2hf", tmp_path / "m", tmp_path / "hf", "--checksums", "sha256", "--verify")
    lines = [f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in _files(EXAMPLE)]
    assert (tmp_path / "hf" / "SHA256SUMS").read_text() == "".join(lines)
    succeed("check", tmp_path / "hf")
    shard = tmp_path / "hf" / "model-00002-of-00003.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    done = transcode("check", tmp_path / "hf")
    assert (done.code, shard.name in done.err) == (5, True)


def test_an_overwritten_export_keeps_foreign_files_and_drops_old_weights(tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "m")
    shutil.copytree(EXAMPLE, tmp_path / "hf")
    (tmp_path / "hf" / "notes" / "deep").mkdir(parents=True)
    (tmp_path / "hf" / "notes" / "deep" / "mine.txt").write_text("mine")
    (tmp_path / "hf" / "notes" / "link").symlink_to("deep/mine.txt")
    inode = (tmp_path / "hf" / "notes" / "deep" / "mine.txt").stat().st_ino
    transcoder.mcore2hf(tmp_path / "m", tmp_path / "hf", overwrite=True, max_shard_size="1MB", dtype="float32")
    found = tree(tmp_path / "hf")
    assert found["notes/deep/mine.txt"] == b"mine" and "notes/link" in found
    assert (tmp_path / "hf" / "notes" / "deep" / "mine.txt").stat().st_ino == inode
    assert not any(name.startswith("model-") and name.endswith("-of-00003.safetensors") for name in found)
    assert not (tmp_path / "hf.partial").exists()
    transcoder.check(tmp_path / "hf")


def test_linked_shards_are_read_on_request_alone_by_every_command(tmp_path: Path) -> None:
    linked = tmp_path / "linked"
    linked.mkdir()
    for file in EXAMPLE.iterdir():
        (linked / file.name).symlink_to(file) if file.suffix == ".safetensors" else shutil.copy(file, linked)
    lines = {
        "hf2mcore": ["hf2mcore", linked, tmp_path / "m"],
        "mcore2hf": ["mcore2hf", tmp_path / "m", tmp_path / "hf", "--hf-model", linked],
        "verify": ["verify", linked, tmp_path / "m"],
        "check": ["check", linked],
        "inspect": ["inspect", linked],
        "roundtrip": ["roundtrip", linked],
    }
    for name, line in lines.items():
        refused = transcode(*line)
        assert (refused.code, "--follow-links" in refused.err) == (5 if name == "check" else 3, True), refused.err
        succeed(*line, "--follow-links")
    assert tree(tmp_path / "hf") == tree(EXAMPLE)
