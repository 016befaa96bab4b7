"""Every attack of `attacks/` has the outcome that it demands; the sandbox that judges them sees what must not be."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from command_line import names

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from attacks import judge, sandbox  # noqa: E402
from attacks.case import MODULES, all_cases  # noqa: E402
from attacks.opcodes import dumps  # noqa: E402
from attacks.pickles import EVIL  # noqa: E402

CASES = all_cases()
PATIENCE = 600.0  # seconds for all attacks on a busy machine; each has a deadline of its own


@cache
def rows() -> dict[str, list[dict[str, Any]]]:
    """What became of every attack, by its name: one process for all, which forks one for each command."""
    command = [sys.executable, str(ROOT / "attacks" / "run.py"), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, env=environment())
    assert done.returncode == 0, done.stderr
    found: dict[str, list[dict[str, Any]]] = {}
    for row in map(json.loads, done.stdout.splitlines()):
        found.setdefault(row["case"], []).append(row)
    return found


def environment() -> dict[str, str]:
    """Without the settings of this process's own tests."""
    return {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")} | {"OMP_NUM_THREADS": "1"}


@pytest.mark.parametrize("module", MODULES)
def test_every_attack_has_the_outcome_that_it_demands(module: str) -> None:
    wanted = [name for name, case in CASES.items() if case.module == module]
    wrong = {f"{name}: {row['command']}": (row["problems"], row["err"][:300]) for name in wanted
             for row in rows()[name] if row["problems"]}  # fmt: skip
    assert not wrong, json.dumps(wrong, indent=1)


def test_every_command_of_every_attack_ran() -> None:
    assert {name: len(found) for name, found in rows().items()} == {n: len(case.commands) for n, case in CASES.items()}


def test_there_are_attacks_of_every_kind() -> None:
    outcomes = [case.outcome for case in CASES.values()]
    assert len(CASES) >= 150
    assert outcomes.count("ok") >= 40 and outcomes.count("warn") >= 40 and outcomes.count("reject") >= 150
    assert all(case.summary.endswith((".", "?")) for case in CASES.values()), "every attack says what it is"


def watched(action: Callable[[], object], place: Path) -> sandbox.Ended:
    """What the sandbox says of an action."""
    os.environ[sandbox.CANARY] = str(place / "canary")
    bounds = sandbox.Bounds((str(place / "in"),), (str(place / "out"),))
    return sandbox.run(lambda: int(action() is None), place / "log", bounds)


FORBIDDEN: dict[str, Callable[[], object]] = {
    "a pickle is loaded": lambda: pickle.loads(dumps(EVIL["exec"])),
    "a command runs": lambda: os.system("true"),
    "a process starts": lambda: subprocess.run(["true"]),
    "text is run": lambda: exec("1 + 1"),
    "text is compiled": lambda: compile("1 + 1", "<input>", "eval"),
    "a module of the input is imported": lambda: __import__("antigravity"),
    "a file outside is read": lambda: Path("/etc/hostname").read_bytes(),
    "a file outside is written": lambda: Path("/tmp/attack-that-must-not-be").write_text("x"),
    "a name outside is removed": lambda: Path("/tmp/attack-that-must-not-be").unlink(),
    "a file outside is opened by descriptor": lambda: os.open("hostname", 0, dir_fd=os.open("/etc", os.O_PATH)),
    "a host is called": lambda: __import__("socket").create_connection(("127.0.0.1", 9)),
}  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_the_sandbox_sees(name: str, tmp_path: Path) -> None:
    ended = watched(FORBIDDEN[name], tmp_path)
    assert ended.seen, ended
    assert not (tmp_path / "canary").exists()


def test_the_sandbox_lets_ordinary_work_pass(tmp_path: Path) -> None:
    for folder in ("in", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "in" / "a").write_text("hello")

    def copy() -> int:
        (tmp_path / "out" / "b").write_text((tmp_path / "in" / "a").read_text())
        return 0

    ended = watched(copy, tmp_path)
    assert (ended.code, ended.seen) == (0, ())
    assert names(tmp_path / "out") == ["b"]


def test_the_sandbox_ends_what_eats_memory(tmp_path: Path) -> None:
    ended = watched(lambda: bytearray(3 << 30), tmp_path)
    assert ended.code == 70
    assert ended.peak < 2 << 30


@pytest.mark.parametrize(
    ("text", "word"),
    [("a\x1b[31m", "U\\+001B"), ("a\u202eb", "U\\+202E"), ("x" * 401, "401"), ("a\x9bb", "U\\+009B")],
)
def test_the_judge_sees_text_that_a_terminal_would_obey(text: str, word: str) -> None:
    with pytest.raises(AssertionError, match=word):
        assert not judge.problems_of_text(text, "stderr")


def test_the_judge_wants_one_paragraph() -> None:
    assert not judge.problems_of_error("warning: a\nerror: b\n  c\n")
    assert judge.problems_of_error("error: a\n\nb\n")
    assert judge.problems_of_error("Traceback (most recent call last):\nerror: a\n")
    assert judge.problems_of_error("error: a\nerror: b\n")
