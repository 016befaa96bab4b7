"""Going on with what was interrupted, and refusing to go on with something else."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command_line import Tree, names, succeed, transcode, tree
from meanwhile import SMALL, STOP, meanwhile, payload, refused

import transcoder
from transcoder import InputError, OutputError, TranscoderError

GRID = {"tp": 2, "pp": 2}


class EnoughError(Exception):
    """Raised by a listener to end a run."""


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as those of the commands' results."""
    monkeypatch.setattr("transcoder.engine.BAND", 1024)


def _left(partial: Path) -> Tree:
    """A work folder, but for the file in which every run signs."""
    return {name: data for name, data in tree(partial).items() if name != "lock"}


def _stopped(line: list[Any]) -> None:
    """Die in the middle."""
    done = meanwhile(line, "os._exit(77)")
    assert done.code == 77, done.err
    assert names(line[2].parent) == ["new.partial", "source"]


def test_a_source_that_changed_in_between_is_refused_by_name(tmp_path: Path, line: list[Any]) -> None:
    path = payload(line)
    _stopped(line)
    before = _left(tmp_path / "new.partial")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    refused(transcode(*line, "--resume", driver=SMALL), 3, path.name, "modified")
    assert _left(tmp_path / "new.partial") == before
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    succeed(*line, "--resume", driver=SMALL)


OPTIONS = {"hf2mcore": ["--dtype", "float32"], "mcore2hf": ["--dtype", "float16"]}


def test_other_options_are_refused_by_name(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped(line)
    done = transcode(*line, *OPTIONS[line[0]], "--resume", driver=SMALL)
    refused(done, 2, "dtype", "--overwrite")
    assert names(tmp_path) == ["new.partial", "source"]
    succeed(*line, "--resume", "--workers", 3, "--memory", "50MiB", "--no-sync", driver=SMALL)
    assert tree(tmp_path / "new") == tree(results[line[0]])


def test_another_grid_is_refused_by_name(tmp_path: Path, results: dict[str, Path]) -> None:
    line = ["hf2mcore", shutil.copytree(results["source"], tmp_path / "source"), tmp_path / "new", "--tp", 2]
    _stopped(line)
    refused(transcode(*line[:3], "--tp", 1, "--resume", driver=SMALL), 2, "tp")


def test_another_command_is_refused(tmp_path: Path, results: dict[str, Path]) -> None:
    line = ["hf2mcore", shutil.copytree(results["source"], tmp_path / "source"), tmp_path / "new"]
    _stopped(line)
    done = transcode("mcore2hf", results["hf2mcore"], tmp_path / "new", "--resume")
    assert done.code in (2, 3), done.err
    assert names(tmp_path) == ["new.partial", "source"]


def test_another_version_is_refused_by_name(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped(line)
    driver = SMALL + "import transcoder.identity as identity\nidentity.TOOL_VERSION = '99.7'\n"
    refused(transcode(*line, "--resume", driver=driver), 2, "99.7", transcoder.__version__)
    succeed(*line, "--resume", driver=SMALL)
    assert tree(tmp_path / "new") == tree(results[line[0]])


def test_resuming_does_not_read_again_what_is_done(line: list[Any], results: dict[str, Path]) -> None:
    """The run that goes on reads fewer bytes than the whole."""
    assert meanwhile([*line, "--workers", 1], "os._exit(77)", stop=60).code == 77
    driver = (
        SMALL
        + """
import transcoder.mapped, transcoder.chunks, atexit
ready, read = transcoder.mapped.ready, []
def counted(view, start, stop, file, tensor):
    read.append(stop - start)
    return ready(view, start, stop, file, tensor)
engine.ready = transcoder.chunks.ready = counted
atexit.register(lambda: print("read", sum(read), file=__import__("sys").stderr))
"""
    )
    counts = [
        int(succeed(*line[:2], target, *line[3:], *flags, "--quiet", driver=driver).err.split()[-1])
        for target, flags in ((line[2], ["--resume"]), (line[2].with_name("all"), []))
    ]
    assert 0 < counts[0] < 0.8 * counts[1]
    assert tree(line[2]) == tree(results[line[0]])


def test_nothing_to_resume_is_a_fresh_run(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    succeed(*line, "--resume", driver=SMALL)
    assert names(tmp_path) == ["new", "source"]
    assert tree(tmp_path / "new") == tree(results[line[0]])


def test_an_empty_work_folder_is_nothing_to_resume(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    (tmp_path / "new.partial").mkdir()
    succeed(*line, "--resume", driver=SMALL)
    assert names(tmp_path) == ["new", "source"]
    assert tree(tmp_path / "new") == tree(results[line[0]])


def test_a_finished_destination_is_not_touched_by_resuming(tmp_path: Path, line: list[Any]) -> None:
    succeed(*line, driver=SMALL)
    before = tree(tmp_path / "new")
    done = transcode(*line, "--resume", driver=SMALL)
    assert done.code in (0, 4), done.err
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], before)


def test_a_leftover_is_four_and_names_both_ways_on(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped(line)
    before = _left(tmp_path / "new.partial")
    refused(transcode(*line, driver=SMALL), 4, "new.partial", "unfinished", "--resume", "--overwrite")
    assert _left(tmp_path / "new.partial") == before
    succeed(*line, "--overwrite", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


JOURNALS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: b"\xff\xfe{]" * 50,
    "cut": lambda data: data[:-3],
    "cut in half": lambda data: data[: len(data) // 2],
    "zeros at the end": lambda data: data[:-50] + bytes(50),
    "a flipped bit": lambda data: (
        data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]
    ),
    "a flipped bit in the first line": lambda data: data[:30] + bytes([data[30] ^ 1]) + data[31:],
    "lines in another order": lambda data: b"".join([*(rows := data.splitlines(True))[:1], *rows[:0:-1]]),
    "a line twice": lambda data: data + data.splitlines(True)[-1],
    "no line end": lambda data: data[:-1],
}


@pytest.mark.parametrize("damage", JOURNALS)
def test_a_damaged_journal_never_gives_other_bytes(
    tmp_path: Path, line: list[Any], results: dict[str, Path], damage: str
) -> None:
    _stopped(line)
    journal = tmp_path / "new.partial" / "journal"
    journal.write_bytes(JOURNALS[damage](journal.read_bytes()))
    done = transcode(*line, "--resume", driver=SMALL)
    if done.code:
        refused(done, 4, "journal", "--overwrite")
        assert not (tmp_path / "new").exists()
        succeed(*line, "--overwrite", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


@pytest.mark.parametrize("change", ["gone", "shorter", "another"])
def test_work_that_was_tampered_with_never_gives_other_bytes(
    tmp_path: Path, line: list[Any], results: dict[str, Path], change: str
) -> None:
    _stopped(line)
    path = max(
        filter(Path.is_file, (tmp_path / "new.partial" / "out").rglob("*")), key=lambda path: path.stat().st_size
    )
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        os.truncate(path, 100)
    else:
        path.unlink()
        path.write_bytes(bytes(10))
    done = transcode(*line, "--resume", driver=SMALL)
    if done.code:
        refused(done, 4, path.name)
        assert not (tmp_path / "new").exists()
        succeed(*line, "--overwrite", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


def test_a_listener_that_raises_ends_the_run_which_can_go_on(
    tmp_path: Path, results: dict[str, Path], small_bands: None
) -> None:
    seen: list[object] = []

    def listen(progress: object) -> None:
        seen.append(progress)
        if len(seen) == STOP:
            raise EnoughError

    with pytest.raises(EnoughError):
        transcoder.hf2mcore(results["source"], tmp_path / "new", progress=listen, **GRID)
    assert names(tmp_path) == ["new.partial"]
    with pytest.raises(OutputError, match="--resume"):
        transcoder.hf2mcore(results["source"], tmp_path / "new", **GRID)
    transcoder.hf2mcore(results["source"], tmp_path / "new", resume=True, **GRID)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(results["hf2mcore"]))


def test_an_interrupted_run_that_verifies_can_go_on(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped([*line, "--verify"])
    succeed(*line, "--verify", "--resume", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


def test_a_refused_source_leaves_nothing(tmp_path: Path, results: dict[str, Path]) -> None:
    own = shutil.copytree(results["source"], tmp_path / "source")
    (own / "config.json").write_text("{}")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(TranscoderError) as found:
            transcoder.hf2mcore(own, tmp_path / "new", **flags)  # type: ignore[arg-type]
        assert isinstance(found.value, InputError)
        assert names(tmp_path) == ["source"]


def test_a_place_that_cannot_be_written_is_four(tmp_path: Path, line: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    line[2] = tmp_path / "file" / "new"
    refused(transcode(*line), 4, "file")
    line[2] = Path("/proc/self/new")
    refused(transcode(*line, "--resume"), 4, "/proc/self/new")
