"""Generates with every case on all ranks: `torchrun --nproc-per-node N .../generate_worker.py CASES.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from transcoder.errors import InputError
from transcoder.generate import generate
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import generation, text
from transcoder.runtime.process import guarded, place
from transcoder.runtime.session import Chosen, Conversation, open_model
from transcoder.runtime.voice import Voice


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Tokens of this rank; where the logits are, also those of the prompt and the smallest gap between two choices."""
    folder = Path(case["hf"])
    config = read_config(folder)
    asked = generation.Asked((case["prompt"],), tuple(case.get("images", ())), limit=case["limit"])
    (request,) = generation.make_requests(asked, folder, config, text.load_tokenizer(folder))
    mesh = Mesh(*(case.get(name, 1) for name in ("tp", "pp", "ep", "etp")))
    weights, dtype = Path(case.get("weights", case["hf"])), case.get("dtype", "float32")
    model = open_model(config, Chosen(folder, weights, mesh, dtype, "cpu", case.get("exact", False)))
    conversation = Conversation(model, config, request, len(request.ids) + case["limit"], case.get("cached", True))
    steps = []
    for step in generation.greedy(conversation, text.read_habits(folder, config), case["limit"]):
        if step.number == 2 and place().rank == case.get("failing_rank"):
            Path(case["mark"]).touch()
            raise InputError("this rank fails on purpose")  # while the other waits for it
        steps.append(step)
    found: dict[str, Any] = {"tokens": [step.token for step in steps]}
    if steps[0].output is not None:
        best = torch.stack([step.scores.topk(2).values for step in steps])
        logits = steps[0].output[0].double()
        found |= {"gap": float((best[:, 0] - best[:, 1]).min()), "logits": logits.tolist()}
    return found


def everywhere(case: dict[str, Any]) -> dict[str, Any]:
    """The result of a case; AssertionError when ranks have different tokens."""
    parts: list[Any] = [run_case(case)]
    if place().world > 1:
        mine, parts = parts[0], [None] * place().world
        dist.all_gather_object(parts, mine)
    assert all(part["tokens"] == parts[0]["tokens"] for part in parts), [part["tokens"] for part in parts]
    return next(part for part in parts if "logits" in part)


def main(path: str) -> int:
    """Run every case; the results go to PATH.out. The command of the last one, if it has one, is run as well."""
    torch.set_num_threads(1)
    cases = json.loads(Path(path).read_text())
    found = [everywhere(case) for case in cases]
    if place().rank == 0:
        Path(f"{path}.out").write_text(json.dumps(found))
    command = cases[-1].get("command")
    return int(generate.main(command, standalone_mode=False)) if command else 0


if __name__ == "__main__":
    sys.exit(guarded(lambda: main(sys.argv[1]), Voice("generate", level="debug")))
