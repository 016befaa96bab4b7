"""What the exit status says, what stands on stderr beside it, and that a run that fails leaves nothing behind."""

from __future__ import annotations

import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import EXAMPLE, Result, command_of, flip, names, succeed, transcode, tree

import transcoder
from transcoder.iterations import STATE_TRACKER, TEXT_TRACKER

REPO = Path(__file__).parent.parent
WAIT = 30.0  # seconds until a run must have begun, and until it must have ended
SLOW = """
import time
from transcoder.progress import Tally
moved = Tally.moved
Tally.moved = lambda self, size: (moved(self, size), time.sleep(0.2))
"""
BROKEN = "import transcoder.api as api\napi.hf2mcore = lambda *a, **k: {}['no such field']"
REQUEST = "please report it"


def _refused(done: Result, code: int, *words: str) -> None:
    """One message on stderr, with these words in it."""
    assert done.code == code, done.err
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    assert [word for word in words if word not in done.err] == []


def test_success_is_zero_with_nothing_on_stderr(tmp_path: Path) -> None:
    done = succeed("hf2mcore", EXAMPLE, tmp_path / "mcore")
    assert done.err == ""
    assert names(tmp_path) == ["mcore"]


def test_an_internal_error_is_one_and_asks_for_a_report(tmp_path: Path) -> None:
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "mcore", driver=BROKEN)
    _refused(done, 1, "KeyError", "no such field", "this is a bug of transcode", REQUEST, "--log-level debug")
    assert names(tmp_path) == []


def test_debugging_shows_the_traceback(tmp_path: Path) -> None:
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "mcore", "--log-level", "debug", driver=BROKEN)
    assert done.code == 1
    assert "Traceback (most recent call last)" in done.err
    assert done.err.splitlines()[-1].startswith("error: KeyError")


USAGE: dict[str, tuple[list[str], str]] = {
    "no arguments": (["hf2mcore"], "SRC"),
    "unknown command": (["convert"], "convert"),
    "unknown option": (["hf2mcore", "A", "B", "--tensor-parallel", "2"], "--tensor-parallel"),
    "unknown dtype": (["hf2mcore", "A", "B", "--dtype", "int8"], "bfloat16"),
    "unknown layout": (["hf2mcore", "A", "B", "--layout", "flat"], "per-layer"),
    "unknown level": (["inspect", "A", "--log-level", "loud"], "debug"),
    "iteration": (["hf2mcore", str(EXAMPLE), "B", "--iteration", "last"], "release"),
    "negative iteration": (["hf2mcore", str(EXAMPLE), "B", "--iteration", "-1"], "number"),
    "iteration of eight digits": (["hf2mcore", str(EXAMPLE), "B", "--iteration", "10000000"], "number"),
    "tp of nothing": (["hf2mcore", str(EXAMPLE), "B", "--tp", "0"], "--tp 0"),
    "negative workers": (["hf2mcore", str(EXAMPLE), "B", "--workers", "-1"], "--workers"),
    "little memory": (["hf2mcore", str(EXAMPLE), "B", "--memory", "15MiB"], "16MiB"),
    "little memory for a round trip": (["roundtrip", str(EXAMPLE), "--memory", "16777215"], "16MiB"),
    "no size": (["hf2mcore", str(EXAMPLE), "B", "--memory", "plenty"], "64MiB"),
    "size of an unknown unit": (["hf2mcore", str(EXAMPLE), "B", "--memory", "64MX"], "64MX"),
    "negative size": (["hf2mcore", str(EXAMPLE), "B", "--memory", "-64MiB"], "-64MiB"),
}


@pytest.mark.parametrize("case", USAGE)
def test_wrong_usage_is_two_and_writes_nothing(tmp_path: Path, case: str) -> None:
    line, word = USAGE[case]
    _refused(transcode(*line, cwd=tmp_path), 2, word)
    assert names(tmp_path) == []


GRIDS: dict[str, tuple[list[str], str]] = {
    "heads": (["--tp", "3"], "values that fit: 1, 2, 4, 8"),
    "ffn": (["--tp", "64"], "values that fit: 1, 2, 4, 8"),
    "layers": (["--pp", "5"], "values that fit: 1 to 4"),
    "experts": (["--ep", "2"], "the value that fits is 1"),
    "expert tensor": (["--etp", "2"], "the value that fits is 1"),
}


@pytest.mark.parametrize("case", GRIDS)
def test_a_grid_that_does_not_fit_is_two_and_says_what_fits(tmp_path: Path, case: str) -> None:
    options, fits = GRIDS[case]
    _refused(transcode("hf2mcore", EXAMPLE, tmp_path / "mcore", *options), 2, fits, options[0])
    _refused(transcode("plan", EXAMPLE, *options), 2, fits)
    assert names(tmp_path) == []


def test_the_values_that_are_said_to_fit_do_fit(tmp_path: Path) -> None:
    for tp in (1, 2, 4, 8):
        succeed("plan", EXAMPLE, "--tp", tp)
    for pp in (1, 2, 3, 4):
        succeed("plan", EXAMPLE, "--pp", pp)


def test_a_destination_inside_the_source_is_two_and_the_reverse(tmp_path: Path, mcore: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "a" / "source")
    before = tree(tmp_path)
    for one, two in ((source, source / "mcore"), (source, source), (source, tmp_path / "a")):
        _refused(transcode("hf2mcore", one, two, "--overwrite"), 2, str(two))
    _refused(transcode("mcore2hf", mcore, mcore / "hf"), 2, str(mcore / "hf"))
    _refused(transcode("mcore2hf", mcore / "iter_0000000", mcore, "--overwrite"), 2, str(mcore))
    assert tree(tmp_path) == before


def test_a_destination_inside_the_source_by_way_of_a_link_is_two(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    (tmp_path / "link").symlink_to(source)
    _refused(transcode("hf2mcore", source, tmp_path / "link" / "mcore"), 2, "link")


def test_a_missing_source_is_three_and_named(tmp_path: Path) -> None:
    for line in (["hf2mcore", "absent", "new"], ["mcore2hf", "absent", "new"], ["verify", "absent", EXAMPLE]):
        _refused(transcode(*line, cwd=tmp_path), 3, "absent")
    assert names(tmp_path) == []


def test_a_damaged_source_is_three_and_leaves_nothing(tmp_path: Path, mcore: Path) -> None:
    source = shutil.copytree(mcore, tmp_path / "mcore", symlinks=True) / "iter_0000000"
    chunk = transcoder.open_checkpoint(source)["decoder.final_layernorm.weight"].chunks[0]
    flip(source / chunk.file, chunk.offset)
    _refused(transcode("mcore2hf", source, tmp_path / "hf"), 3, "decoder.final_layernorm.weight", chunk.file, "CRC-32")
    assert names(tmp_path) == ["mcore"]


def test_trackers_that_name_different_iterations_are_three(tmp_path: Path, mcore: Path) -> None:
    source = shutil.copytree(mcore, tmp_path / "mcore", symlinks=True)
    shutil.copytree(source / "iter_0000000", source / "iter_0000007")
    (source / TEXT_TRACKER).write_text("7")
    done = transcode("mcore2hf", source, tmp_path / "hf")
    _refused(done, 3, "iter_0000007", "iter_0000000", TEXT_TRACKER, STATE_TRACKER)
    succeed("mcore2hf", source / "iter_0000007", tmp_path / "hf")


def test_a_destination_that_is_not_empty_is_four_and_stays_as_it_is(tmp_path: Path, mcore: Path) -> None:
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "notes").write_text("mine")
    for command, source in (("hf2mcore", EXAMPLE), ("mcore2hf", mcore)):
        _refused(transcode(command, source, tmp_path / "new"), 4, "not empty", "--overwrite")
    assert tree(tmp_path) == {"new/notes": b"mine"}


def test_an_empty_destination_is_used(tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    succeed("hf2mcore", EXAMPLE, tmp_path / "new")
    assert "iter_0000000" in names(tmp_path / "new")


def test_a_destination_that_is_a_file_is_four(tmp_path: Path) -> None:
    (tmp_path / "new").write_text("mine")
    _refused(transcode("hf2mcore", EXAMPLE, tmp_path / "new", "--overwrite"), 4, "not a directory")
    _refused(transcode("hf2mcore", EXAMPLE, tmp_path / "new" / "below"), 4, str(tmp_path / "new" / "below"))
    assert tree(tmp_path) == {"new": b"mine"}


def test_a_leftover_work_folder_is_four_and_not_touched(tmp_path: Path, mcore: Path) -> None:
    (tmp_path / "new.partial").mkdir()
    (tmp_path / "new.partial" / "part").write_text("of another run")
    for command, source in (("hf2mcore", EXAMPLE), ("mcore2hf", mcore)):
        _refused(transcode(command, source, tmp_path / "new"), 4, "new.partial")
    assert tree(tmp_path) == {"new.partial/part": b"of another run"}


@pytest.mark.parametrize("limit", [0, 100_000, 600_000])
def test_a_write_that_the_system_refuses_is_four_and_leaves_nothing(tmp_path: Path, mcore: Path, limit: int) -> None:
    driver = f"import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {resource.RLIM_INFINITY}))"
    for command, source in (("hf2mcore", EXAMPLE), ("mcore2hf", mcore)):
        _refused(transcode(command, source, tmp_path / "new", driver=driver), 4, "File too large")
    assert names(tmp_path) == []


def test_differences_are_five(tmp_path: Path, mcore: Path) -> None:
    changed = shutil.copytree(EXAMPLE, tmp_path / "changed")
    flip(changed / "model-00001-of-00003.safetensors", -1)
    _refused(transcode("verify", changed, mcore), 5, "1 tensors differ", "1 elements differ")
    _refused(transcode("roundtrip", changed, "--megatron-load-path", mcore), 5, "1 tensors differ")
    _refused(transcode("check", _without(mcore, tmp_path / "mcore", "__0_0.distcp")), 5, "__0_0.distcp")


def _without(checkpoint: Path, copy: Path, name: str) -> Path:
    shutil.copytree(checkpoint, copy, symlinks=True)
    (copy / "iter_0000000" / name).unlink()
    return copy


def test_a_result_that_verify_finds_different_is_five_and_leaves_nothing(tmp_path: Path) -> None:
    driver = """
import transcoder.engine as engine
scatter = engine.scatter
def wrong(atlas, tensor, start, band, sink):
    band = band.copy()
    band[0] ^= tensor.name == "model.norm.weight"
    scatter(atlas, tensor, start, band, sink)
engine.scatter = wrong
"""
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "mcore", "--verify", driver=driver)
    _refused(done, 5, "model.norm.weight", "first at [0]")
    assert names(tmp_path) == []


def _begun(partial: Path, process: subprocess.Popen[str]) -> None:
    """Wait until the run has noted something as done."""
    deadline = time.monotonic() + WAIT
    journal = partial / "journal"
    while not (journal.exists() and b'"tensor"' in journal.read_bytes()):
        assert process.poll() is None, "the run ended before it was interrupted"
        assert time.monotonic() < deadline, "the run has not begun"
        time.sleep(0.005)


def _interrupted(line: list[object], partial: Path, number: signal.Signals, driver: str) -> Result:
    command = [*command_of(driver), *map(str, line)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        _begun(partial, process)
        process.send_signal(number)
        out, err = process.communicate(timeout=WAIT)
    finally:
        process.kill()
    return Result(process.returncode, out, err)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_import_can_be_continued(tmp_path: Path, mcore: Path, number: signal.Signals, code: int) -> None:
    line = ["hf2mcore", EXAMPLE, tmp_path / "new", "--json"]
    done = _interrupted(line, tmp_path / "new.partial", number, SLOW)
    _refused(done, code, "interrupted", "--resume")
    assert names(tmp_path) == ["new.partial"]
    assert (done.report["error"]["code"], done.report["error"]["kind"]) == (code, "interrupted")
    _refused(transcode("hf2mcore", EXAMPLE, tmp_path / "new"), 4, "unfinished", "--resume", "--overwrite")
    succeed("hf2mcore", EXAMPLE, tmp_path / "new", "--resume")
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(mcore))


def test_an_interrupted_export_can_be_continued(tmp_path: Path, mcore: Path) -> None:
    line = ["mcore2hf", mcore, tmp_path / "new", "--quiet"]
    done = _interrupted(line, tmp_path / "new.partial", signal.SIGTERM, SLOW)
    _refused(done, 143, "interrupted", "--resume")
    assert (names(tmp_path), done.out) == (["new.partial"], "")
    succeed("mcore2hf", mcore, tmp_path / "new", "--resume")
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(EXAMPLE))


def test_an_interrupted_overwrite_leaves_the_old_state(tmp_path: Path, mcore: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, tmp_path / "new", tp=2)
    before = tree(tmp_path / "new")
    line = ["hf2mcore", EXAMPLE, tmp_path / "new", "--overwrite"]
    done = _interrupted(line, tmp_path / "new.partial", signal.SIGINT, SLOW)
    assert done.code == 130
    assert tree(tmp_path / "new") == before
    succeed(*line, "--resume")
    assert (names(tmp_path), tree(tmp_path / "new")) == (["new"], tree(mcore))


def test_the_plain_command_ends_by_a_signal_in_the_middle_of_a_larger_model(tmp_path: Path) -> None:
    source = tmp_path / "source"
    sizes = {"layers": 6, "hidden": 1024, "ffn": 4096, "heads": 16, "kv-heads": 8, "vocabulary": 32000, "shard-mb": 60}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    writer = [command_of("0")[0], REPO / "benchmarks" / "synthetic.py", source, *options]
    subprocess.run(writer, check=True, capture_output=True, timeout=WAIT)
    done = _interrupted(["hf2mcore", source, tmp_path / "new"], tmp_path / "new.partial", signal.SIGTERM, "")
    _refused(done, 143, "interrupted")
    assert names(tmp_path) == ["new.partial", "source"]
    succeed("hf2mcore", source, tmp_path / "new", "--resume")
    transcoder.hf2mcore(source, tmp_path / "other")
    assert tree(tmp_path / "new") == tree(tmp_path / "other")


STOPS: dict[str, Callable[[Path], list[object]]] = {
    "verify": lambda mcore: ["verify", EXAMPLE, mcore],
    "check": lambda mcore: ["check", mcore],
    "roundtrip": lambda mcore: ["roundtrip", EXAMPLE],
}


@pytest.mark.parametrize("command", STOPS)
@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_commands_that_only_read_can_be_interrupted(mcore: Path, command: str, name: str, code: int) -> None:
    module = "api" if command == "roundtrip" else "reading"
    driver = f"""
import os, signal
import transcoder.{module} as module
module.{command} = lambda *a, **k: (os.kill(os.getpid(), signal.{name}), __import__("time").sleep(20))
"""
    done = transcode(*STOPS[command](mcore), driver=driver)
    _refused(done, code, "interrupted")
