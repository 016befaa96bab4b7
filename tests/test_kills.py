"""Real processes that are killed, interrupted, or meet another one on the same destination."""

from __future__ import annotations

import os
import random
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from command_line import EXAMPLE, PATIENCE, Result, command_of, names, succeed, transcode, tree
from fault_model import write_llama

import transcoder

SEED = 20
BANDS = "import transcoder.engine as engine\nengine.BAND = {band}\n"
SLOW = (
    BANDS
    + """
import time
from transcoder.progress import Tally
moved = Tally.moved
Tally.moved = lambda self, size: (moved(self, size), time.sleep({pause}))
"""
)
Line = list[object]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of a few hundred bands of 1 KiB; not to be changed."""
    return write_llama(tmp_path_factory.mktemp("kills") / "hf", layers=20, hidden=64, shards=3)


@pytest.fixture(scope="module")
def sources(source: Path) -> dict[str, Path]:
    """What each command converts, and what it gives without interruption."""
    mcore, back = source.parent / "mcore", source.parent / "back"
    succeed("hf2mcore", source, mcore, "--tp", 2, "--pp", 2, driver=BANDS.format(band=1024))
    succeed("mcore2hf", mcore, back, driver=BANDS.format(band=1024))
    found = {"hf2mcore": source, "mcore2hf": mcore, "hf2mcore result": mcore, "mcore2hf result": back}
    for form in ("zarr", "zarr3"):
        found[form], found[f"{form} result"] = source, source.parent / form
        succeed(*_line(form, found, found[f"{form} result"]), driver=BANDS.format(band=1024))  # type: ignore[arg-type]
    return found


def _line(command: str, sources: dict[str, Path], target: Path, *more: object) -> Line:
    """`command`: one of the program's, or the format of an import."""
    form: Line = ["--format", command] if command.startswith("zarr") else []
    grid: Line = ["--tp", 2, "--pp", 2] if form or command == "hf2mcore" else []
    return ["hf2mcore" if form else command, sources[command], target, *grid, *form, *more]


def _start(line: Line, driver: str, **streams: object) -> subprocess.Popen[str]:
    how = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True} | streams
    return subprocess.Popen([*command_of(driver), *map(str, line)], **how)  # type: ignore[call-overload, no-any-return]


def _progress(target: Path) -> int:
    """How many bands its journal has."""
    try:
        return (target.parent / f"{target.name}.partial" / "journal").read_bytes().count(b'"tensor"')
    except FileNotFoundError:
        return 0


def _wait(target: Path, process: subprocess.Popen[str], least: int = 8) -> None:
    """Until the journal has some bands."""
    deadline = time.monotonic() + PATIENCE
    while _progress(target) < least:
        assert process.poll() is None, process.stderr.read() if process.stderr else "ended early"
        assert time.monotonic() < deadline, "the run has not begun"
        time.sleep(0.002)


def _killed_until_done(line: Line, target: Path, kills: int, pause: float) -> int:
    """Kill it again and again at random moments, `kills` times inside its work. Returns how often it was killed."""
    chance, done, driver = random.Random(SEED), 0, SLOW.format(band=1024, pause=pause)
    while True:
        process = _start([*line, "--resume"], driver if done < kills else BANDS.format(band=1024))
        known, deadline = _progress(target), time.monotonic() + PATIENCE
        while process.poll() is None and done < kills and _progress(target) <= known:
            assert time.monotonic() < deadline, "the run does nothing"
            time.sleep(0.001)
        if done >= kills:
            _, errors = process.communicate(timeout=PATIENCE)
            assert process.returncode == 0, errors
            return done
        time.sleep(chance.random() * 3 * pause)
        process.kill()
        process.communicate()
        assert process.returncode == -signal.SIGKILL, f"it ended after {done} kills"
        assert not target.exists()
        done += 1


@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf", "zarr", "zarr3"])
def test_a_conversion_that_is_killed_five_times_gives_the_same_bytes(
    tmp_path: Path, sources: dict[str, Path], command: str
) -> None:
    print(f"seed {SEED}")
    assert _killed_until_done(_line(command, sources, tmp_path / "new"), tmp_path / "new", 5, 0.02) == 5
    assert names(tmp_path) == ["new"]
    assert tree(tmp_path / "new") == tree(sources[f"{command} result"])


@pytest.mark.slow
@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf"])
def test_a_conversion_that_is_killed_fifty_times_gives_the_same_bytes(
    tmp_path: Path, sources: dict[str, Path], command: str
) -> None:
    print(f"seed {SEED}")
    assert _killed_until_done(_line(command, sources, tmp_path / "new"), tmp_path / "new", 50, 0.02) == 50
    assert names(tmp_path) == ["new"]
    assert tree(tmp_path / "new") == tree(sources[f"{command} result"])


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf"])
def test_kills_at_any_moment_of_the_process_give_the_same_bytes(
    tmp_path: Path, sources: dict[str, Path], command: str
) -> None:
    """Start and commit included; every kill is followed by a run that ends."""
    chance, line, driver = random.Random(SEED), _line(command, sources, tmp_path / "new"), BANDS.format(band=1024)
    began = time.monotonic()
    succeed(*line, driver=driver)  # type: ignore[arg-type]
    usual = time.monotonic() - began
    for _ in range(25):
        shutil.rmtree(tmp_path / "new")
        process = _start([*line, "--resume"], driver)
        time.sleep(usual * chance.uniform(0.2, 1.1))
        process.kill()
        process.communicate()
        if not (tmp_path / "new").exists() or names(tmp_path) != ["new"]:
            succeed(*line, "--resume", driver=driver)  # type: ignore[arg-type]
        assert names(tmp_path) == ["new"]
        assert tree(tmp_path / "new") == tree(sources[f"{command} result"])


def test_a_second_run_is_refused_at_once_and_names_the_first(tmp_path: Path, sources: dict[str, Path]) -> None:
    line = _line("hf2mcore", sources, tmp_path / "new")
    first = _start(line, SLOW.format(band=1024, pause=0.1))
    try:
        _wait(tmp_path / "new", first)
        for flag in ([], ["--resume"], ["--overwrite"]):
            began = time.monotonic()
            second = transcode(*line, *flag)  # type: ignore[arg-type]
            assert second.code == 4, second.err
            assert str(first.pid) in second.err
            assert os.uname().nodename in second.err
            assert time.monotonic() - began < 10
            assert first.poll() is None
    finally:
        first.kill()
        first.communicate()
    succeed(*line, "--resume", driver=BANDS.format(band=1024))  # type: ignore[arg-type]
    assert tree(tmp_path / "new") == tree(sources["hf2mcore result"])


def _ended(process: subprocess.Popen[str]) -> Result:
    out, err = process.communicate(timeout=PATIENCE)
    return Result(process.returncode, out or "", err or "")


SIGNALS = [("SIGINT", 130), ("SIGTERM", 143)]


@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf"])
@pytest.mark.parametrize(("name", "code"), SIGNALS)
def test_a_signal_stops_a_run_soon_and_it_can_go_on(
    tmp_path: Path, sources: dict[str, Path], command: str, name: str, code: int
) -> None:
    line = _line(command, sources, tmp_path / "new")
    process = _start(line, SLOW.format(band=1024, pause=0.05))
    _wait(tmp_path / "new", process)
    process.send_signal(signal.Signals[name])
    began = time.monotonic()
    done = _ended(process)
    assert time.monotonic() - began < 5
    assert (done.code, "--resume" in done.err, "Traceback" in done.err) == (code, True, False), done.err
    assert names(tmp_path) == ["new.partial"]
    succeed(*line, "--resume", driver=BANDS.format(band=1024))  # type: ignore[arg-type]
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(sources[f"{command} result"]))


def test_a_second_signal_ends_a_run_at_once(tmp_path: Path, sources: dict[str, Path]) -> None:
    process = _start(_line("hf2mcore", sources, tmp_path / "new"), SLOW.format(band=1024, pause=2))
    _wait(tmp_path / "new", process, 1)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    done = _ended(process)
    assert time.monotonic() - began < 5
    assert done.code in (143, -signal.SIGTERM), done.err
    assert not (tmp_path / "new").exists()


def test_a_terminal_that_is_closed_leaves_a_run_that_can_go_on(tmp_path: Path, sources: dict[str, Path]) -> None:
    line = _line("hf2mcore", sources, tmp_path / "new")
    process = _start(line, SLOW.format(band=1024, pause=0.05))
    _wait(tmp_path / "new", process)
    process.send_signal(signal.SIGHUP)
    done = _ended(process)
    assert done.code in (129, -signal.SIGHUP, 0), done.err
    assert "Traceback" not in done.err
    succeed(*line, "--resume", driver=BANDS.format(band=1024)) if done.code else None  # type: ignore[arg-type]
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(sources["hf2mcore result"]))


@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf"])
def test_readers_that_go_away_do_not_stop_a_conversion(tmp_path: Path, sources: dict[str, Path], command: str) -> None:
    """stdout and stderr are pipes that nobody reads, SIGPIPE is what it is by default, or both are closed."""
    line, driver = _line(command, sources, tmp_path / "new"), BANDS.format(band=1024)
    start = " ".join(shlex.quote(str(word)) for word in [*command_of(driver), *line])
    for words in ("| true", ">&-", ">&- 2>&-", "2>&1 | true", "> /dev/full", "< /dev/null"):
        done = subprocess.run(["bash", "-c", f"{start} {words}"], capture_output=True, text=True, timeout=PATIENCE)
        assert "Traceback" not in done.stderr, words
        assert "Exception ignored" not in done.stderr, words
        left = [*names(tmp_path)]
        if left != ["new"]:
            assert left in ([], ["new.partial"]), words
            succeed(*line, "--resume", driver=driver)  # type: ignore[arg-type]
        assert tree(tmp_path / "new") == tree(sources[f"{command} result"])
        shutil.rmtree(tmp_path / "new")


def test_a_signal_before_the_work_begins_leaves_nothing_or_something_to_go_on_with(tmp_path: Path) -> None:
    chance = random.Random(SEED)
    for _ in range(4):
        process = _start(["hf2mcore", EXAMPLE, tmp_path / "new"], "")
        time.sleep(chance.uniform(0.05, 0.5))
        process.send_signal(signal.SIGTERM)
        done = _ended(process)
        assert done.code in (143, -signal.SIGTERM, 0), done.err
        if done.code and "new" not in names(tmp_path):  # else it came after the last rename
            succeed("hf2mcore", EXAMPLE, tmp_path / "new", "--resume")
        transcoder.check(tmp_path / "new")
        shutil.rmtree(tmp_path / "new.partial", ignore_errors=True)
        assert names(tmp_path) == ["new"]
        shutil.rmtree(tmp_path / "new")
