"""The options that generate and compare share; nothing heavy is imported, so that --help is quick."""

from __future__ import annotations

from typing import Any

import click

from transcoder.options import DTYPES, GRID

CONTEXT: dict[str, Any] = {
    "token_normalize_func": lambda name: name.replace("_", "-"),
    "help_option_names": ["-h", "--help"],
}
MODEL = [
    click.option(
        "--hf-model-path", default=None, metavar="DIR", help="config, tokenizer and, without the next, weights"
    ),
    click.option("--megatron-model-path", default=None, metavar="DIR", help="take the weights from this checkpoint"),
]
PROMPT = [
    click.option("--prompt", default=None, metavar="TEXT", help="what to continue, or to answer with --chat"),
    click.option("--image-path", multiple=True, metavar="FILE|URL", help="an image to describe; repeatable"),
    click.option("--chat", is_flag=True, help="put the prompt into the model's chat template"),
]
PLACE = [
    *GRID,
    click.option("--dtype", default=None, type=DTYPES, help="compute type; default float32 on CPU, the model's on GPU"),
    click.option("--device", default=None, type=click.Choice(["cpu", "cuda"]), help="default: cuda where there is one"),
    click.option("--exact", is_flag=True, help="add in float64, so that no choice depends on --tp"),
]
