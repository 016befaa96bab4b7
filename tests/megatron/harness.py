"""Runs worker.py under torchrun and returns its results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

WORKER = Path(__file__).resolve().parent / "worker.py"
TIMEOUT = 240.0


def _environment() -> dict[str, str]:
    """One thread per process, nothing from the network."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    return {key: value for key, value in os.environ.items() if key not in dropped} | quiet


def _command(world: int, worker: Path, cases: Path, python: Path | str) -> list[str]:
    start = [str(python), "-W", "ignore", "-m", "torch.distributed.run", "--standalone"]
    return [*start, "--nproc-per-node", str(world), str(worker), str(cases)]


def _run(command: list[str], timeout: float) -> tuple[int, str]:
    """Exit status and output; the whole process group ends at the timeout."""
    process = subprocess.Popen(
        command, env=_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        return -1, f"{output}\ntimed out after {timeout} s"
    return process.returncode, output


def _results(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def launch(
    cases: list[dict[str, Any]],
    world: int,
    workdir: Path,
    timeout: float = TIMEOUT,
    python: Path | str = sys.executable,
    worker: Path = WORKER,
) -> list[dict[str, Any]]:
    """Run the cases on `world` ranks in one launch; AssertionError with everything said when one fails.

    python: the interpreter, whose megatron-core it is.
    """
    workdir.mkdir(parents=True, exist_ok=True)
    path = Path(tempfile.mkstemp(prefix="cases-", suffix=".json", dir=workdir)[1])
    path.write_text(json.dumps(cases))
    status, output = _run(_command(world, worker, path, python), timeout)
    results = _results(Path(f"{path}.out"))
    failures = [f"{result['case']}\n  " + "\n  ".join(result["failures"]) for result in results if not result["ok"]]
    if status or failures or len(results) != len(cases):
        raise AssertionError("\n".join([f"worker: exit status {status}", *failures, output[-6000:]]))
    return results
