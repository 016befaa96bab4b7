"""Any strided copy from a file arrives in the memory of a model, and little memory is used beside that."""

from __future__ import annotations

import json
import random
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder import InputError
from transcoder.moves import Copy
from transcoder.runtime import filling
from transcoder.runtime.shards import Shard
from transcoder.spec import DTYPES

BENCHMARK = Path(__file__).parent.parent / "benchmarks" / "load.py"
MIB = 1 << 20


def random_copy(rng: random.Random) -> Copy:
    """Some axes that do not overlap on either side, in another order on each."""
    shape = tuple(rng.choice((2, 3, 7)) for _ in range(rng.randint(0, 3)))
    sides = []
    for order in (list(range(len(shape))), rng.sample(range(len(shape)), len(shape))):
        steps, step = [0] * len(shape), 1
        for axis in reversed(order):
            steps[axis], step = step, step * (shape[axis] + rng.choice((0, 0, 2)))
        sides.append(tuple(steps))
    return Copy(shape, rng.randint(0, 3), sides[0], rng.randint(0, 3), sides[1])


@pytest.mark.parametrize("row", (1, 9, 100))
@pytest.mark.parametrize("stored", ("float32", "bfloat16"))
@pytest.mark.parametrize("seed", range(20))
def test_any_strided_copy_arrives(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: str, row: int, seed: int
) -> None:
    monkeypatch.setattr(filling, "BAND", 64)
    monkeypatch.setattr(filling, "ROW", row)
    monkeypatch.setattr(filling, "LONG", 12)
    rng, values = random.Random(seed), torch.arange(1.0, 1000.0).to(getattr(torch, stored))
    (tmp_path / "file").write_bytes(b"head" + values.view(torch.uint8).numpy().tobytes())
    for transposed in (False, True):
        copy, memory = random_copy(rng), torch.zeros(40, 25)
        data = memory.T if transposed else memory
        reader = filling.Reader(tmp_path, False, False)
        reader.fill(Shard("", (), (), data, False), copy, "file", 4, DTYPES[stored])
        reader.close()
        want = torch.zeros(1000)
        into = want.as_strided(copy.shape, copy.chunk_steps, copy.chunk)
        into.copy_(values.as_strided(copy.shape, copy.hf_steps, copy.hf))
        assert torch.equal(data.reshape(-1), want)


def test_a_file_that_ends_too_early_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    reader = filling.Reader(tmp_path, False, False)
    shard = Shard("", (), (), torch.zeros(3), False)
    with pytest.raises(InputError, match="file: expected 2 bytes at 10; found the end of the file"):
        reader.fill(shard, Copy((3,), 0, (1,), 0, (1,)), "file", 0, DTYPES["float32"])
    with pytest.raises(InputError, match="absent: "):
        reader.fill(shard, Copy((3,), 0, (1,), 0, (1,)), "absent", 0, DTYPES["float32"])
    reader.close()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, dict[str, Any]]]:
    """What the benchmark says of loading 200 MB from each source; every way in a process of its own."""
    folder = tmp_path_factory.mktemp("memory")
    command = [sys.executable, "-W", "ignore", str(BENCHMARK), "--workdir", str(folder), "--json", "--rounds", "1"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    yield {row["way"]: row for row in map(json.loads, done.stdout.splitlines())}
    shutil.rmtree(folder)


def test_memory_beside_the_parameters_stays_under_32_mib(measured: dict[str, dict[str, Any]]) -> None:
    ours = {way: row for way, row in measured.items() if way != "megatron-core"}
    assert len(ours) == 4 and all(row["parameter_bytes"] > 190 * MIB for row in ours.values())
    for way, row in ours.items():
        assert -MIB < row["anonymous"] - row["parameter_bytes"] <= 32 * MIB, (way, row)
    stock = measured["megatron-core"]
    assert stock["anonymous"] > 1.2 * stock["parameter_bytes"]
    assert len({row["digest"] for row in measured.values() if row["dtype"] == "bfloat16"}) == 1
