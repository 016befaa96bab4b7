"""A disk that is too small, or that fills while a conversion runs."""

from __future__ import annotations

import resource
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import names, succeed, transcode, tree
from meanwhile import SMALL, meanwhile, refused

LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"


@pytest.mark.parametrize("limit", [0, 2000, 20_000])
def test_a_disk_that_fills_meanwhile_is_four_and_one_can_go_on(
    tmp_path: Path, line: list[Any], results: dict[str, Path], limit: int
) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    refused(meanwhile(line, LIMIT.format(limit=limit)), 4, "File too large", "--resume")
    assert not (tmp_path / "new").exists()
    succeed(*line, "--resume", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


@contextmanager
def _small_disk(place: Path, size: int) -> Iterator[bool]:
    """A disk of so many bytes at `place`, where mounting is allowed."""
    place.mkdir()
    words = ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(place)]
    mounted = shutil.which("mount") is not None and not subprocess.run(words, capture_output=True).returncode
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", str(place)], check=True)


@pytest.mark.parametrize("size", [40 << 10, 100 << 10])
def test_a_small_disk_is_four_before_the_first_byte(tmp_path: Path, line: list[Any], size: int) -> None:
    with _small_disk(tmp_path / "disk", size) as mounted:
        line[2] = tmp_path / "disk" / "new"
        if mounted:
            refused(transcode(*line, driver=SMALL), 4, "bytes")
            assert names(tmp_path / "disk") in ([], ["new.partial"])


def test_a_disk_that_others_fill_meanwhile_is_four_and_one_can_go_on(
    tmp_path: Path, line: list[Any], results: dict[str, Path]
) -> None:
    with _small_disk(tmp_path / "disk", 8 << 20) as mounted:
        line[2] = tmp_path / "disk" / "new"
        if mounted:
            fills = f"subprocess.run(['dd', 'if=/dev/zero', 'of={tmp_path}/disk/full', 'bs=4k'], capture_output=True)"
            done = meanwhile([*line, "--workers", 1], f"import subprocess; {fills}")
            refused(done, 4, "o space left", "--resume")
            assert not line[2].exists()
            (tmp_path / "disk" / "full").unlink()
            succeed(*line, "--resume", driver=SMALL)
            assert (names(tmp_path / "disk"), tree(line[2])) == (["new"], tree(results[line[0]]))
