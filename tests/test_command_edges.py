"""Edges of the command line: odd terminals, signals during cleaning up, values that JSON lacks, trees that change."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from importlib.resources import files
from pathlib import Path

import jsonschema
import pytest
from command_line import EXAMPLE, command_of, names, succeed, transcode

import transcoder

SCHEMA = jsonschema.Draft202012Validator(json.loads((files("transcoder") / "schema.json").read_text()))
NORM = "model.norm.weight"
SLOW = """
import time
from transcoder.progress import Tally
moved = Tally.moved
Tally.moved = lambda self, size: (moved(self, size), time.sleep(0.2))
"""
SIGNAL_AGAIN = """
import os, signal
from transcoder import work
keep = work.worth_keeping
def again(*a):
    os.kill(os.getpid(), signal.SIGHUP)
    return keep(*a)
work.worth_keeping = again
"""


def put(source: Path, bits: bytes) -> None:
    """Set the first element of one tensor."""
    c = transcoder.open_checkpoint(source)[NORM].chunks[0]
    p = source / c.file
    d = bytearray(p.read_bytes())
    d[c.offset : c.offset + 2] = bits
    p.write_bytes(d)


def test_architectures_fit_the_schema() -> None:
    assert [e.message for e in SCHEMA.iter_errors(transcode("architectures", "--json").report)] == []


@pytest.mark.parametrize("bits", [b"\xc0\x7f", b"\x80\x7f"])
def test_a_difference_that_is_no_number_is_still_json(tmp_path: Path, bits: bytes) -> None:
    s = shutil.copytree(EXAMPLE, tmp_path / "s")
    put(s, bits)
    r = transcode("verify", s, EXAMPLE, "--json").report
    assert [e.message for e in SCHEMA.iter_errors(r)] == []
    assert r["differences"][0]["max_abs"] is None


def test_tensors_that_cannot_be_compared_fit_the_schema(tmp_path: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "m", "--dtype", "float32")
    r = transcode("verify", EXAMPLE, tmp_path / "m", "--json").report
    assert [e.message for e in SCHEMA.iter_errors(r)] == []


def test_release_over_the_default_tree(tmp_path: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "m")
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "m", "--overwrite", "--iteration", "release")
    assert done.code == 0, done.err
    assert not (tmp_path / "m" / "latest_train_state.pt").exists()


def test_where_links_cannot_be_made(tmp_path: Path) -> None:
    driver = "import os\ndef no(*a, **k): raise PermissionError(1, 'Operation not permitted')\nos.symlink = no"
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "m", driver=driver)
    assert done.code == 0, done.err
    assert (tmp_path / "m" / "latest_checkpointed_iteration.txt").read_text() == "0"


@pytest.mark.parametrize("n", ["0", "-3"])
def test_vocabulary_divisor(tmp_path: Path, n: str) -> None:
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "m", "--make-vocab-size-divisible-by", n)
    assert done.code == 2, done.err


@pytest.mark.parametrize("line", [["plan", EXAMPLE], ["hf2mcore", EXAMPLE, "x", "--dry-run"]])
def test_plan_refuses_little_memory(line: list[str], tmp_path: Path) -> None:
    assert transcode(*line, "--memory", "1MiB", cwd=tmp_path).code == 2
    assert transcode(*line, "--workers", "-1", cwd=tmp_path).code == 2


def test_device_map_in_json(tmp_path: Path) -> None:
    r = transcode(
        "import", "--hf-model", EXAMPLE, "--megatron-path", tmp_path / "m", "--device-map", "auto", "--json"
    ).report
    assert any("device-map" in w for w in r["warnings"])


def test_ascii_stdout(tmp_path: Path) -> None:
    done = transcode("hf2mcore", EXAMPLE, tmp_path / "m", PYTHONIOENCODING="ascii")
    assert done.code == 0, done.err


def test_broken_pipe() -> None:
    done = subprocess.run(
        f"{command_of()[0]} inspect {EXAMPLE} --tree | head -1", shell=True, capture_output=True, text=True
    )
    assert "bug" not in done.stderr


def test_full_stdout() -> None:
    done = subprocess.run(
        f"{command_of()[0]} inspect {EXAMPLE} --tree >/dev/full", shell=True, capture_output=True, text=True
    )
    assert done.returncode == 4, done.stderr


def test_undecodable_path(tmp_path: Path) -> None:
    s = os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9")
    shutil.copytree(EXAMPLE, s)
    done = subprocess.run([*command_of(), "check", s, "--json"], capture_output=True)
    assert done.returncode == 0, done.stderr[-300:]
    json.loads(done.stdout)


def test_paths_with_spaces_are_quoted(tmp_path: Path) -> None:
    out = succeed("hf2mcore", EXAMPLE, tmp_path / "my model").out.splitlines()[-4:]
    assert f"--load '{tmp_path / 'my model'}'" in out[0]


def test_roundtrip_says_parameters() -> None:
    assert (
        "number of parameters on (tensor, pipeline) model parallel rank (0, 0): 1000576"
        in succeed("roundtrip", EXAMPLE).out
    )


def test_destination_is_null_or_the_place(tmp_path: Path) -> None:
    assert succeed("roundtrip", EXAMPLE, "--json").report["destination"] is None
    assert succeed("plan", EXAMPLE, "--json").report["destination"] is None


def test_dry_run_destination(tmp_path: Path) -> None:
    assert succeed("hf2mcore", EXAMPLE, tmp_path / "m", "--dry-run", "--json").report["destination"] == str(
        tmp_path / "m"
    )


def test_failed_object_says_source(tmp_path: Path) -> None:
    assert transcode("hf2mcore", EXAMPLE, tmp_path / "m", "--tp", 3, "--json").report["source"] == str(EXAMPLE)


def test_choices_are_spelled_as_people_know_them() -> None:
    assert "torch_dist" in succeed("hf2mcore", "--help").out


def test_roundtrip_written_counts_megatron(tmp_path: Path) -> None:
    r = succeed("roundtrip", EXAMPLE, "--megatron-save-path", tmp_path / "m", "--json").report
    assert r["bytes_written"] > 0


def _signalled(tmp_path: Path, driver: str, number: signal.Signals) -> int:
    command = [*command_of(driver), "hf2mcore", str(EXAMPLE), str(tmp_path / "m")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 30
    journal = tmp_path / "m.partial" / "journal"
    while not (journal.exists() and b'"tensor"' in journal.read_bytes()) and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(number)
    process.communicate(timeout=30)
    return process.returncode


@pytest.mark.parametrize("driver", [SLOW + SIGNAL_AGAIN, SLOW])
def test_signals_leave_something_to_go_on_with_even_when_they_repeat(tmp_path: Path, driver: str) -> None:
    assert _signalled(tmp_path, driver, signal.SIGHUP) == 129
    assert names(tmp_path) == ["m.partial"]
    succeed("hf2mcore", EXAMPLE, tmp_path / "m", "--resume")
    assert names(tmp_path) == ["m"]


def test_no_command_shows_help() -> None:
    assert not transcode().err.startswith("error: Usage")


def test_max_shard_zero(tmp_path: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "m")
    assert transcode("mcore2hf", tmp_path / "m", tmp_path / "h", "--max-shard-size", "0").code == 2


def test_roundtrip_refuses_places_inside_its_source(tmp_path: Path) -> None:
    s = shutil.copytree(EXAMPLE, tmp_path / "model")
    assert transcode("roundtrip", s, "--megatron-save-path", s / "m").code == 2
    assert transcode("roundtrip", s, s).code == 2


def test_roundtrip_refuses_before_writing_megatron(tmp_path: Path) -> None:
    succeed("roundtrip", EXAMPLE, tmp_path / "o")
    assert transcode("roundtrip", EXAMPLE, tmp_path / "o", "--megatron-save-path", tmp_path / "m").code == 4
    assert names(tmp_path) == ["o"]
