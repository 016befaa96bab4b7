"""The command line: parse, call, print. Results go to stdout, messages to stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import click

from transcoder.errors import TranscoderError

GRID = [click.option(f"--{name}", default=1, show_default=True, help=f"{name} size") for name in ("tp", "pp", "ep", "etp")]
COMMON = [
    click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout"),
    click.option("--quiet", is_flag=True, help="no messages"),
]


def options(*groups: list[Any]) -> Callable[[Any], Any]:
    """Add groups of options to a command."""

    def add(function: Any) -> Any:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return add


@click.group()
def cli() -> None:
    """Stream weights between Hugging Face safetensors and Megatron-Core distributed checkpoints."""


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option("--dtype", default="", type=click.Choice(["", "bfloat16", "float16", "float32"]))
@click.option("--overwrite", is_flag=True, help="replace an existing destination")
@click.option("--no-sync", is_flag=True, help="leave flushing to the kernel")
@options(GRID, COMMON)
def hf2mcore(src: str, dst: str, no_sync: bool, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Hugging Face directory → Megatron distributed checkpoint."""
    from transcoder import api

    show("hf2mcore", lambda: api.hf2mcore(src, dst, sync=not no_sync, **chosen), as_json, quiet)


@cli.command()
@click.argument("src")
@click.argument("dst")
@click.option("--hf-model", default=None, help="directory whose config, tokenizer and shard map are used")
@click.option("--overwrite", is_flag=True, help="replace an existing destination")
@click.option("--no-sync", is_flag=True, help="leave flushing to the kernel")
@options(COMMON)
def mcore2hf(src: str, dst: str, no_sync: bool, as_json: bool, quiet: bool, **chosen: Any) -> None:
    """Megatron checkpoint → Hugging Face directory."""
    from transcoder import api

    show("mcore2hf", lambda: api.mcore2hf(src, dst, sync=not no_sync, **chosen), as_json, quiet)


@cli.command()
@click.argument("one")
@click.argument("two")
@options(COMMON)
def verify(one: str, two: str, as_json: bool, quiet: bool) -> None:
    """Compare two checkpoints of any format, bit for bit."""
    from transcoder import api

    show("verify", lambda: api.verify(one, two), as_json, quiet)


@cli.command()
@click.argument("directory")
@options(COMMON)
def inspect(directory: str, as_json: bool, quiet: bool) -> None:
    """Keys, dtypes, shapes and chunk counts of a Megatron checkpoint."""
    from transcoder import api

    show("inspect", lambda: api.inspect(directory), as_json, quiet)


def show(command: str, work: Callable[[], dict[str, Any]], as_json: bool, quiet: bool) -> None:
    """Run, print the report or the error, and exit with the error's status."""
    try:
        report = {"status": "ok", "command": command, **work()}
    except TranscoderError as error:
        if as_json:
            click.echo(json.dumps({"status": "error", "command": command, "error": error.as_json()}))
        click.echo(f"error: {error}", err=True)
        sys.exit(error.exit_code)
    if as_json:
        click.echo(json.dumps(report))
    elif not quiet:
        for text in report.get("warnings", ()):
            click.echo(f"warning: {text}", err=True)
        for row in report.get("keys", ()):
            click.echo(f"{row['dtype']:<9} {row['shape']!s:<20} {row['chunks']:>4} chunks  {row['key']}")
        click.echo(f"{command}: {report['tensors']} tensors, {report['source']}{arrow(report)}")


def arrow(report: dict[str, Any]) -> str:
    """The destination as the closing line names it."""
    return f" -> {report['destination']}" if "destination" in report else ""


def main() -> None:
    """The entry point of `transcode`."""
    cli()
