"""Very many tensors: nothing leaks, memory stays bounded, and time grows as their number does."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from command_line import command_of
from fault_model import write_llama

import transcoder

PER_LAYER, OTHERS = 9, 3
MEMORY = 64 << 20
BOUND = MEMORY + (96 << 20) + (90 << 20)  # bytes: buffers, the process, the plan of a very large model


def _model(folder: Path, tensors: int) -> Path:
    """A model of at least so many tensors, in eight files."""
    return write_llama(folder, layers=-(-(tensors - OTHERS) // PER_LAYER), shards=8)


def _open() -> tuple[int, int]:
    return len([*Path("/proc/self/fd").iterdir()]), threading.active_count()


def test_ten_thousand_tensors_leak_neither_files_nor_threads(tmp_path: Path) -> None:
    source = _model(tmp_path / "hf", 10_000)
    before, most = _open(), [0, 0]

    def listen(progress: object) -> None:
        now = _open()
        most[:] = max(most[0], now[0]), max(most[1], now[1])

    transcoder.hf2mcore(source, tmp_path / "mcore", tp=2, pp=2, sync=False, progress=listen)
    assert _open() == before
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", sync=False, progress=listen)
    assert _open() == before
    assert most[0] <= before[0] + 64
    assert most[1] <= before[1] + 8
    transcoder.verify(source, tmp_path / "back")


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "hf2mcore": lambda place: ["hf2mcore", f"{place}/hf", f"{place}/mcore", "--tp", "2", "--pp", "2"],
    "mcore2hf": lambda place: ["mcore2hf", f"{place}/mcore", f"{place}/back"],
}


def _cost(line: list[str]) -> tuple[float, int]:
    """CPU seconds of a command and the most anonymous memory it had."""
    words = [*command_of(), *line, "--no-sync", "--quiet", "--no-progress"]
    pid = os.posix_spawn(words[0], words, os.environ)
    most = 0
    while os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        most = max(most, _anonymous(pid))
        time.sleep(0.02)
    _, status, usage = os.wait4(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return usage.ru_utime + usage.ru_stime, most


def _anonymous(pid: int) -> int:
    rows = Path(f"/proc/{pid}/status").read_text().splitlines()
    return sum(int(row.split()[1]) << 10 for row in rows if row.startswith("RssAnon:"))


@pytest.mark.slow
@pytest.mark.exhaustive
def test_fifty_thousand_tensors_take_bounded_memory_and_linear_time(tmp_path: Path) -> None:
    found: dict[tuple[str, int], tuple[float, int]] = {}
    for count in (12_500, 50_000):
        place = tmp_path / str(count)
        _model(place / "hf", count)
        for command, line in COMMANDS.items():
            found[command, count] = _cost(line(place))
    print({key: (round(seconds, 1), memory >> 20) for key, (seconds, memory) in found.items()})
    for command in COMMANDS:
        assert found[command, 50_000][0] <= 4 * 1.5 * found[command, 12_500][0], command
        assert found[command, 50_000][1] <= BOUND, command
