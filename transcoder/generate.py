"""`torchrun -m transcoder.generate`: greedy text, about images too, from a Hugging Face or a Megatron checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from transcoder.errors import UsageError, refuse
from transcoder.mesh import Mesh
from transcoder.options import COMMON, options
from transcoder.runtime.arguments import CONTEXT, MODEL, PLACE, PROMPT
from transcoder.runtime.process import choose_device, enter, guarded
from transcoder.runtime.voice import Voice, voice_of


@click.command(context_settings=CONTEXT)
@options(MODEL, PROMPT, PLACE, COMMON)
@click.option("--batch-file", default=None, metavar="FILE", help="prompts, one a line")
@click.option("--max-new-tokens", default=20, show_default=True, type=click.IntRange(min=1), metavar="N")
@click.option("--no-cache", is_flag=True, help="recompute the whole text for every token")
@click.option("--verbose", is_flag=True, help="the lines of every step, not of the first five alone")
def generate(**chosen: Any) -> int:
    """Continue a prompt greedily on a megatron-core model, in one process or under torchrun."""
    voice = voice_of("generate", chosen)
    return guarded(lambda: _run(chosen, voice), voice)


def _run(chosen: dict[str, Any], voice: Voice) -> int:
    for name in ("hf_model_path", "megatron_model_path"):  # before anything slow is imported
        if chosen[name] is not None and not Path(chosen[name]).is_dir():
            raise refuse("not-found", f"{chosen[name]}: no such directory")
    device = choose_device(chosen["device"])  # before megatron-core looks for a GPU
    from transcoder.runtime.generation import DESCRIBE, Asked, run
    from transcoder.runtime.text import read_prompts

    prompts = [chosen["prompt"]] if chosen["prompt"] is not None else []
    if chosen["batch_file"] is not None:
        if prompts:
            raise UsageError("give --prompt or --batch-file, not both", kind="usage")
        prompts = read_prompts(Path(chosen["batch_file"]))
    if not prompts and not chosen["image_path"]:
        raise UsageError("give --prompt TEXT or --batch-file FILE", kind="usage")
    asked = Asked(
        tuple(prompts or [DESCRIBE]),
        chosen["image_path"],
        chosen["chat"],
        chosen["max_new_tokens"],
        not chosen["no_cache"],
        chosen["verbose"],
    )
    mesh = Mesh(chosen["tp"], chosen["pp"], chosen["ep"], chosen["etp"])
    return run(asked, chosen["hf_model_path"], chosen["megatron_model_path"], mesh, chosen | {"device": device}, voice)


if __name__ == "__main__":
    enter(generate)
