"""Going on, refusing to go on, and sources and disks that change while a conversion runs."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from command_line import Result, names, succeed, transcode, tree
from fault_model import write_llama

import transcoder
from transcoder import InputError, OutputError, TranscoderError

STOP = 7  # bands after which something happens
AT_A_BAND = """
import os, resource, shutil
import transcoder.engine as engine
from transcoder.progress import Tally
engine.BAND = 1024
moved, seen = Tally.moved, []
def happens(self, size):
    seen.append(size)
    if len(seen) == {stop}:
        {event}
    moved(self, size)
Tally.moved = happens
"""
SMALL = "import transcoder.engine as engine\nengine.BAND = 1024\n"
GRID = {"tp": 2, "pp": 2}


class Stopped(Exception):
    """Raised by a listener to end a run."""


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few hundred bands of 1 KiB; not to be changed."""
    return write_llama(tmp_path_factory.mktemp("resume") / "hf", layers=8, hidden=64, shards=2)


@pytest.fixture(scope="module")
def results(source: Path) -> dict[str, Path]:
    """What undisturbed conversions give."""
    mcore, back = source.parent / "mcore", source.parent / "back"
    succeed("hf2mcore", source, mcore, "--tp", 2, "--pp", 2, driver=SMALL)
    succeed("mcore2hf", mcore, back, driver=SMALL)
    return {"hf2mcore": mcore, "mcore2hf": back}


@pytest.fixture(params=["hf2mcore", "mcore2hf"])
def line(request: pytest.FixtureRequest, tmp_path: Path, source: Path, results: dict[str, Path]) -> list[Any]:
    """A command on a source of its own."""
    command = str(request.param)
    own = shutil.copytree(source if command == "hf2mcore" else results["hf2mcore"], tmp_path / "source", symlinks=True)
    return [command, own, tmp_path / "new", *(["--tp", 2, "--pp", 2] if command == "hf2mcore" else [])]


@pytest.fixture
def small_bands(monkeypatch: pytest.MonkeyPatch) -> None:
    """As small as those of the commands' results."""
    monkeypatch.setattr("transcoder.engine.BAND", 1024)


def _payload(line: list[Any]) -> Path:
    """A file of the source from which the last bands are read."""
    return max(line[1].rglob("*.safetensors" if line[0] == "hf2mcore" else "*.distcp"), key=lambda path: path.name)


def _meanwhile(line: list[Any], event: str, stop: int = STOP) -> Result:
    return transcode(*line, driver=AT_A_BAND.format(stop=stop, event=event))


def _refused(done: Result, code: int, *words: str) -> None:
    assert done.code == code, done.err
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    assert [word for word in words if word not in done.err] == [], done.err


EVENTS = {
    "touched": "os.utime({path!r}, ns=(1, 1))",
    "replaced": "shutil.copy2({path!r}, {path!r} + '.copy'); os.replace({path!r} + '.copy', {path!r})",
    "longer": "open({path!r}, 'ab').write(b'more')",
    "emptied": "os.truncate({path!r}, 0)",
    "cut": "os.truncate({path!r}, 5000)",
    "gone": "os.unlink({path!r})",
    "written over": "os.pwrite(os.open({path!r}, os.O_RDWR), b'other', os.stat({path!r}).st_size // 2)",
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_source_that_changes_meanwhile_is_three_and_named(tmp_path: Path, line: list[Any], event: str) -> None:
    path = _payload(line)
    done = _meanwhile([*line, "--workers", 1], EVENTS[event].format(path=str(path)))
    _refused(done, 3, path.name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("event", ["touched", "replaced", "longer", "cut"])
def test_what_changed_is_said(line: list[Any], event: str) -> None:
    done = _meanwhile([*line, "--workers", 1], EVENTS[event].format(path=str(_payload(line))))
    words = {"touched": ["time"], "replaced": ["inode"], "longer": ["size"], "cut": ["size", "ends before", "cannot be read"]}
    assert any(word in done.err for word in words[event]), done.err


def test_a_side_file_that_changes_meanwhile_is_three(tmp_path: Path, line: list[Any]) -> None:
    path = next(iter(sorted(line[1].rglob("tokenizer.json"))))
    done = _meanwhile(line, f"open({str(path)!r}, 'a').write(' ')")
    _refused(done, 3, "tokenizer.json")
    assert not (tmp_path / "new").exists()


def _stopped(line: list[Any]) -> None:
    """Die in the middle."""
    done = _meanwhile(line, "os._exit(77)")
    assert done.code == 77, done.err
    assert names(line[2].parent) == ["new.partial", "source"]


def test_a_source_that_changed_in_between_is_refused_by_name(tmp_path: Path, line: list[Any]) -> None:
    path = _payload(line)
    _stopped(line)
    before = tree(tmp_path / "new.partial")
    stat = path.stat()
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    _refused(transcode(*line, "--resume", driver=SMALL), 3, path.name, "time")
    kept = {name: data for name, data in tree(tmp_path / "new.partial").items() if name != "lock"}
    assert kept == {name: data for name, data in before.items() if name != "lock"}
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    succeed(*line, "--resume", driver=SMALL)


OPTIONS = {"hf2mcore": ["--dtype", "float32"], "mcore2hf": ["--dtype", "float16"]}


def test_other_options_are_refused_by_name(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped(line)
    done = transcode(*line, *OPTIONS[line[0]], "--resume", driver=SMALL)
    _refused(done, 4, "dtype", "--overwrite")
    assert names(tmp_path) == ["new.partial", "source"]
    succeed(*line, "--resume", "--workers", 3, "--memory", "50MiB", "--no-sync", driver=SMALL)
    assert tree(tmp_path / "new") == tree(results[line[0]])


def test_another_grid_is_refused_by_name(tmp_path: Path, source: Path) -> None:
    line = ["hf2mcore", shutil.copytree(source, tmp_path / "source"), tmp_path / "new", "--tp", 2]
    _stopped(line)
    _refused(transcode(*line[:3], "--tp", 1, "--resume", driver=SMALL), 4, "tp")


def test_another_command_is_refused(tmp_path: Path, source: Path, results: dict[str, Path]) -> None:
    line = ["hf2mcore", shutil.copytree(source, tmp_path / "source"), tmp_path / "new"]
    _stopped(line)
    _refused(transcode("mcore2hf", results["hf2mcore"], tmp_path / "new", "--resume"), 4, "hf2mcore")


def test_another_version_is_refused_by_name(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped(line)
    driver = SMALL + "import transcoder.identity as identity\nidentity.TOOL_VERSION = '99.7'\n"
    _refused(transcode(*line, "--resume", driver=driver), 4, "99.7", transcoder.__version__)
    succeed(*line, "--resume", driver=SMALL)
    assert tree(tmp_path / "new") == tree(results[line[0]])


def test_resuming_does_not_read_again_what_is_done(line: list[Any], results: dict[str, Path]) -> None:
    """The run that goes on reads fewer bytes than the whole."""
    _meanwhile([*line, "--workers", 1], "os._exit(77)", stop=150)
    driver = SMALL + """
import transcoder.mapped, transcoder.chunks, atexit
ready, read = transcoder.mapped.ready, []
def counted(view, start, stop, file, tensor):
    read.append(stop - start)
    return ready(view, start, stop, file, tensor)
engine.ready = transcoder.chunks.ready = counted
atexit.register(lambda: print("read", sum(read), file=__import__("sys").stderr))
"""
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
    before = tree(tmp_path / "new.partial")
    _refused(transcode(*line, driver=SMALL), 4, "new.partial", "unfinished", "--resume", "--overwrite")
    assert tree(tmp_path / "new.partial") == before
    succeed(*line, "--overwrite", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


JOURNALS: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "zeros": lambda data: bytes(len(data)),
    "noise": lambda data: b"\xff\xfe{]" * 50,
    "cut": lambda data: data[:-3],
    "cut in half": lambda data: data[: len(data) // 2],
    "zeros at the end": lambda data: data[:-50] + bytes(50),
    "a flipped bit": lambda data: data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :],
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
        _refused(done, 4, "journal", "--overwrite")
        assert not (tmp_path / "new").exists()
        succeed(*line, "--overwrite", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


@pytest.mark.parametrize("change", ["gone", "shorter", "another"])
def test_work_that_was_tampered_with_never_gives_other_bytes(
    tmp_path: Path, line: list[Any], results: dict[str, Path], change: str
) -> None:
    _stopped(line)
    path = max((tmp_path / "new.partial" / "out").rglob("*.*t*s*"), key=lambda path: path.stat().st_size)
    if change == "gone":
        path.unlink()
    elif change == "shorter":
        os.truncate(path, 100)
    else:
        path.unlink()
        path.write_bytes(bytes(10))
    done = transcode(*line, "--resume", driver=SMALL)
    if done.code:
        _refused(done, 4, path.name)
        assert not (tmp_path / "new").exists()
        succeed(*line, "--overwrite", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))"


@pytest.mark.parametrize("limit", [0, 2000, 20_000])
def test_a_disk_that_fills_meanwhile_is_four_and_one_can_go_on(
    tmp_path: Path, line: list[Any], results: dict[str, Path], limit: int
) -> None:
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    _refused(_meanwhile(line, LIMIT.format(limit=limit)), 4, "File too large", "--resume")
    assert not (tmp_path / "new").exists()
    succeed(*line, "--resume", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


def test_a_listener_that_raises_ends_the_run_which_can_go_on(
    tmp_path: Path, source: Path, results: dict[str, Path], small_bands: None
) -> None:
    seen: list[object] = []

    def listen(progress: object) -> None:
        seen.append(progress)
        if len(seen) == STOP:
            raise Stopped

    with pytest.raises(Stopped):
        transcoder.hf2mcore(source, tmp_path / "new", progress=listen, **GRID)
    assert names(tmp_path) == ["new.partial"]
    with pytest.raises(OutputError, match="--resume"):
        transcoder.hf2mcore(source, tmp_path / "new", **GRID)
    transcoder.hf2mcore(source, tmp_path / "new", resume=True, **GRID)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(results["hf2mcore"]))


def test_an_interrupted_run_that_verifies_can_go_on(tmp_path: Path, line: list[Any], results: dict[str, Path]) -> None:
    _stopped([*line, "--verify"])
    succeed(*line, "--verify", "--resume", driver=SMALL)
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new", "source"], tree(results[line[0]]))


def test_a_refused_source_leaves_nothing(tmp_path: Path, source: Path) -> None:
    own = shutil.copytree(source, tmp_path / "source")
    (own / "config.json").write_text("{}")
    for flags in ({}, {"resume": True}, {"overwrite": True}):
        with pytest.raises(TranscoderError) as found:
            transcoder.hf2mcore(own, tmp_path / "new", **flags)  # type: ignore[arg-type]
        assert isinstance(found.value, InputError)
        assert names(tmp_path) == ["source"]


def test_a_place_that_cannot_be_written_is_four(tmp_path: Path, line: list[Any]) -> None:
    (tmp_path / "file").write_text("")
    line[2] = tmp_path / "file" / "new"
    _refused(transcode(*line), 4, "file")
    line[2] = Path("/proc/self/new")
    _refused(transcode(*line, "--resume"), 4, "/proc/self/new")


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


@pytest.mark.parametrize("size", [40 << 10, 200 << 10])
def test_a_small_disk_is_four_before_the_first_byte(tmp_path: Path, line: list[Any], size: int) -> None:
    with _small_disk(tmp_path / "disk", size) as mounted:
        line[2] = tmp_path / "disk" / "new"
        if mounted:
            _refused(transcode(*line, driver=SMALL), 4, "bytes")
            assert names(tmp_path / "disk") in ([], ["new.partial"])


def test_a_disk_that_others_fill_meanwhile_is_four_and_one_can_go_on(
    tmp_path: Path, line: list[Any], results: dict[str, Path]
) -> None:
    with _small_disk(tmp_path / "disk", 8 << 20) as mounted:
        line[2] = tmp_path / "disk" / "new"
        if mounted:
            fills = f"subprocess.run(['dd', 'if=/dev/zero', 'of={tmp_path}/disk/full', 'bs=4k'], capture_output=True)"
            done = _meanwhile([*line, "--workers", 1], f"import subprocess; {fills}")
            _refused(done, 4, "No space left", "--resume")
            assert not line[2].exists()
            (tmp_path / "disk" / "full").unlink()
            succeed(*line, "--resume", driver=SMALL)
            assert (names(tmp_path / "disk"), tree(line[2])) == (["new"], tree(results[line[0]]))
