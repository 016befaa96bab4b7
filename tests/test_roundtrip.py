"""The example model goes to Megatron and back as the same files, for several grids."""

from __future__ import annotations

import filecmp
import shutil
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


def test_a_side_file_that_links_outside_is_left_out(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(EXAMPLE, source)
    (tmp_path / "secret").write_text("secret")
    (source / "notes.txt").symlink_to(tmp_path / "secret")
    report = transcoder.hf2mcore(source, tmp_path / "mcore")
    assert any("notes.txt" in warning for warning in report["warnings"])
    assert not (tmp_path / "mcore" / "iter_0000000" / "hf" / "notes.txt").exists()
