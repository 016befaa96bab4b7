"""Exports a checkpoint and compares it with the files that the saved model was filled from."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path
from typing import Any

from oracle import read_tensors

import transcoder


def assert_same_tensors(left: Path, right: Path) -> None:
    """The same names, types, shapes and bytes."""
    one, two = read_tensors(left), read_tensors(right)
    assert sorted(one) == sorted(two)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (two[name].dtype, two[name].shape), name
        assert tensor.numpy().tobytes() == two[name].numpy().tobytes(), name


def assert_same_files(left: Path, right: Path) -> None:
    """The same file names and bytes."""
    names = sorted(path.name for path in left.iterdir())
    assert sorted(path.name for path in right.iterdir()) == names
    assert filecmp.cmpfiles(left, right, names, shallow=False) == (names, [], [])


def assert_exports(case: dict[str, Any], target: Path) -> None:
    """What megatron saved becomes the source, tensor by tensor and file by file."""
    source = Path(case["hf"])
    transcoder.mcore2hf(case["ckpt"], target, hf_model=source, sync=False)
    assert_same_tensors(source, target)
    assert_same_files(source, target)
    shutil.rmtree(target)
