"""The example model goes to Megatron and back as the same files, for several grids."""

from __future__ import annotations

import filecmp
from pathlib import Path

import pytest

import transcoder

EXAMPLE = Path(__file__).parent.parent / "examples" / "tiny-llama"


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1)])
def test_export_gives_back_the_original_files(tmp_path: Path, tp: int, pp: int) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "mcore", tp=tp, pp=pp)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "hf")
    names = sorted(path.name for path in EXAMPLE.iterdir())
    assert sorted(path.name for path in (tmp_path / "hf").iterdir()) == names
    assert filecmp.cmpfiles(EXAMPLE, tmp_path / "hf", names, shallow=False)[0] == names
