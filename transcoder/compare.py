"""`torchrun -m transcoder.compare`: one prompt in Hugging Face and on megatron-core, and the first module that differs.

With `--diff LOG_A LOG_B` two logs of earlier runs are compared instead, and no model is needed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from transcoder.errors import DifferenceError, UsageError, refuse
from transcoder.mesh import Mesh
from transcoder.options import COMMON, options
from transcoder.runtime.arguments import CONTEXT, MODEL, PLACE, PROMPT
from transcoder.runtime.process import choose_device, enter, guarded, place
from transcoder.runtime.voice import Voice, voice_of

DEBUG = [
    click.option("--model-class", default=None, metavar="NAME", help="class of transformers; default: config.json's"),
    click.option("--enable-debug-hooks", is_flag=True, help="log every module, name the first that differs"),
    click.option("--backward", is_flag=True, help="log gradients too"),
    click.option("--log-dir", default=None, metavar="DIR", help="where logs go; default: the working directory"),
    click.option("--diff", default=None, nargs=2, metavar="LOG_A LOG_B", help="compare two forward logs; no model"),
    click.option("--html", default=None, metavar="FILE", help="draw divergence by layer"),
]


@click.command(context_settings=CONTEXT)
@options(MODEL, PROMPT, PLACE, DEBUG, COMMON)
@click.option("--verbose", is_flag=True, help="a line for every tensor that is compared, not for the first alone")
def compare(**chosen: Any) -> int:
    """Compare one forward pass in Hugging Face and in megatron-core; exit status 5 when they differ."""
    voice = voice_of("compare", chosen)
    return guarded(lambda: _run(chosen, voice), voice)


def _run(chosen: dict[str, Any], voice: Voice) -> int:
    if chosen["diff"] is not None:
        one, other = map(Path, chosen["diff"])
        return _diff(one, other, chosen, voice)
    for name in ("hf_model_path", "megatron_model_path"):  # before anything slow is imported
        if chosen[name] is not None and not Path(chosen[name]).is_dir():
            raise refuse("not-found", f"{chosen[name]}: no such directory")
    if chosen["hf_model_path"] is None:
        raise UsageError("give --hf_model_path: the weights to compare with are there", kind="usage")
    if chosen["prompt"] is None and not chosen["image_path"]:
        raise UsageError("give --prompt TEXT", kind="usage")
    device = choose_device(chosen["device"])  # before megatron-core looks for a GPU
    from transcoder.runtime.comparison import run
    from transcoder.runtime.generation import DESCRIBE, Asked

    prompt = chosen["prompt"] if chosen["prompt"] is not None else DESCRIBE
    asked = Asked((prompt,), chosen["image_path"], chosen["chat"])
    mesh = Mesh(chosen["tp"], chosen["pp"], chosen["ep"], chosen["etp"])
    return run(asked, chosen["hf_model_path"], chosen["megatron_model_path"], mesh, chosen | {"device": device}, voice)


def _diff(one: Path, other: Path, chosen: dict[str, Any], voice: Voice) -> int:
    """Compare two logs; the first is the reference unless it is Megatron's and the second is not."""
    from transcoder.runtime import divergence, drawing

    records = [divergence.read_log(path) for path in (one, other)]
    if [each[0]["model"] for each in records if each] == ["megatron", "hf"]:
        records.reverse()
    compared = divergence.compare(*records)
    found = divergence.first(compared)
    if place().rank == 0:
        voice.say(divergence.lines(compared, chosen["verbose"]))
        if chosen["html"] is not None:
            drawing.write(Path(chosen["html"]), compared, f"{one} and {other}")
        report = {"source": str(one), "destination": str(other), "comparison": divergence.as_json(compared)}
        voice.tell(report) if found is None else voice.differ(f"the logs differ: {found}", report)
    return 0 if found is None else DifferenceError.exit_code


if __name__ == "__main__":
    enter(compare)
