"""One rank runs transformers for as long as that takes, and tells the result; nobody waits for one that is gone."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path

from command_line import EXAMPLE
from generating import ROOT, torchrun

WORKER = ROOT / "tests" / "megatron" / "slow_worker.py"


def compared(seconds: float, mark: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a comparison on two ranks whose time-out is 3 seconds."""
    model = ("--hf_model_path", str(EXAMPLE), "--prompt", "The assert statement", "--tp", "2")
    return torchrun(2, str(WORKER), str(seconds), str(mark), *model, "--json")


def test_a_reference_slower_than_the_time_outs_is_waited_for(tmp_path: Path) -> None:
    status, out, err = compared(8.0, tmp_path / "mark")
    assert status == 0, f"{out}\n{err[-6000:]}"
    report = json.loads(out)  # one object, from one rank
    assert report["status"] == "ok" and report["comparison"]["matches"] == 4 and report["parallel"]["tp"] == 2


def test_a_reference_that_fails_ends_the_waiting(tmp_path: Path) -> None:
    status, out, err = compared(0.0, tmp_path / "mark")
    assert (tmp_path / "mark").exists(), f"{out}\n{err[-6000:]}"
    assert time.time() - (tmp_path / "mark").stat().st_mtime < 10
    assert status == 1 and json.loads(out)["error"]["message"] == "the reference fails on purpose"
    assert err.count("error: ") == err.count("error: the reference fails on purpose") == 1
    codes = set(re.findall(r"exitcode +: (-?\d+)", err))
    assert "3" in codes and codes <= {"3", "4", "-15"}  # the other lost it while waiting, or was ended
