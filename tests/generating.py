"""Runs the generator in this process, or on several, and asks transformers the same."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from transcoder.generate import generate
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import generation, text
from transcoder.runtime.session import Chosen, Conversation, Request, open_model

ROOT = Path(__file__).resolve().parents[1]
WORKER = ROOT / "tests" / "megatron" / "generate_worker.py"
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = 120.0
TOLERANCE = 1e-4  # of the standard deviation of the logits


def torchrun(world: int, *arguments: str) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a script or of `-m MODULE` on `world` processes; -1 when it hangs."""
    kept = {key: value for key, value in os.environ.items() if key not in LAUNCHER}
    path = os.pathsep.join(filter(None, (str(ROOT), kept.get("PYTHONPATH"))))
    environment = kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    start = [sys.executable, "-W", "ignore", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
    process = subprocess.Popen(
        [*start, str(world), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return -1, *process.communicate()
    return process.returncode, out, err


def work(cases: list[dict[str, Any]], world: int, folder: Path) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of all cases in one launch."""
    path = folder / "cases.json"
    path.write_text(json.dumps(cases))
    return torchrun(world, str(WORKER), str(path))


def launch(cases: list[dict[str, Any]], world: int, folder: Path) -> tuple[list[dict[str, Any]], str]:
    """The results of the cases, all in one launch, and its stdout."""
    status, out, err = work(cases, world, folder)
    assert status == 0, f"{out}\n{err[-6000:]}"
    return json.loads((folder / "cases.json.out").read_text()), out


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m transcoder.generate`, in this process."""
    capsys.readouterr()
    status = generate.main([str(each) for each in arguments], standalone_mode=False)
    return status, *capsys.readouterr()


def request_of(folder: Path, prompt: str, images: tuple[str, ...] = (), **asked: Any) -> Request:
    """A prompt as tokens and patches."""
    words = generation.Asked((prompt,), images, **asked)
    (request,) = generation.make_requests(words, folder, read_config(folder), text.load_tokenizer(folder))
    return request


def model_of(folder: Path, weights: Path | None = None, dtype: str = "float32", exact: bool = False) -> Any:
    """The whole model in this process."""
    return open_model(read_config(folder), Chosen(folder, weights or folder, Mesh(), dtype, "cpu", exact))


def steps_of(model: Any, folder: Path, request: Request, limit: int, cached: bool = True) -> list[generation.Step]:
    """Every greedy step."""
    config = read_config(folder)
    conversation = Conversation(model, config, request, len(request.ids) + limit, cached)
    return list(generation.greedy(conversation, text.read_habits(folder, config), limit))


def tokens_of(steps: list[generation.Step]) -> list[int]:
    """The tokens of the steps."""
    return [step.token for step in steps]


def ask_transformers(model: Any, ids: tuple[int, ...], limit: int, **inputs: Any) -> list[int]:
    """What `generate` of transformers adds to the ids, greedily."""
    tokens = torch.tensor([ids])
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=limit, do_sample=False, pad_token_id=0, **inputs
    )
    return out[0, len(ids) :].tolist()


def assert_says(result: dict[str, Any], folder: Path, theirs: Any, prompt: str, limit: int, what: object) -> None:
    """A worker's logits and greedy tokens are those of the model `theirs` in transformers, no token by luck."""
    ids = request_of(folder, prompt).ids
    with torch.no_grad():
        want = theirs(torch.tensor([ids])).logits[0].double()
    error = float((torch.tensor(result["logits"]) - want).abs().max())
    assert error <= TOLERANCE * float(want.std()), what
    assert result["gap"] > 4 * error, what  # no token is a matter of rounding
    assert result["tokens"] == ask_transformers(theirs, ids, limit), what
