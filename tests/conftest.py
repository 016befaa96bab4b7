"""Fixtures that several modules share; each module has its own copy of what they make."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import transcoder


@pytest.fixture(scope="module")
def mcore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint of the example model; not to be changed."""
    from command_line import EXAMPLE

    folder = tmp_path_factory.mktemp("megatron") / "mcore"
    transcoder.hf2mcore(EXAMPLE, folder)
    return folder


@pytest.fixture
def own(tmp_path: Path, mcore: Path) -> Path:
    """A Megatron checkpoint of this test's own."""
    return shutil.copytree(mcore, tmp_path / "own", symlinks=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged checkpoint and its source."""
    from damage import make_good

    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """An iteration directory to damage."""
    from damage import copied

    return copied(good, tmp_path)
