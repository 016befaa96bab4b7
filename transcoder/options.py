"""Groups of command-line options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from transcoder.console import LEVELS, Console

F = TypeVar("F", bound=Callable[..., Any])
FORMATS = click.Choice(["torch_dist", "zarr", "zarr3"])
EXPERTS = click.Choice(["like-source", "per-expert", "fused"])
DTYPES = click.Choice(["bfloat16", "float16", "float32"])
AXES = {"tp": "tensor", "pp": "pipeline", "ep": "expert", "etp": "expert tensor"}

GRID = [
    click.option(f"--{name}", default=1, show_default=True, help=f"{label} parallel size")
    for name, label in AXES.items()
]
FORM = click.option("--format", default="torch_dist", type=FORMATS, metavar="torch_dist|zarr|zarr3")
LAYOUT = click.option("--layout", default=None, type=click.Choice(["stacked", "per-layer", "singleton"]), help="keys")
NORMS = click.Choice(["te", "local"])
PLACE = [
    click.option("--iteration", default="both", metavar="both|release|N", help="where the checkpoint stands in DST"),
    click.option("--make-vocab-size-divisible-by", default=128, show_default=True, metavar="N"),
]
MEGATRON = [FORM, LAYOUT, click.option("--norm-names", default="te", type=NORMS, help="whose norm names"), *PLACE]
RESHAPE = [
    *(FORM, LAYOUT, click.option("--norm-names", default=None, type=NORMS, help="whose norm names"), *PLACE),
    click.option("--link", is_flag=True, help="hard-link payload files, where no byte of them changes"),
]
REFERENCE = [click.option("--hf-model", default=None, metavar="DIR", help="config, tokenizer and shard map to use")]
MTP = [
    click.option(
        "--mtp", default="keep", show_default=True, type=click.Choice(["keep", "drop"]), help="multi-token prediction"
    )
]
ARCH = [click.option("--arch", default="", metavar="NAME", help="the Hugging Face class, when nothing names it")]
DTYPE = [click.option("--dtype", default=None, type=DTYPES, help="convert the weights to this dtype")]
HUGGING_FACE = [
    *REFERENCE,
    click.option("--expert-layout", default="like-source", type=EXPERTS, metavar="like-source|per-expert|fused"),
    click.option("--quantize", default=None, type=click.Choice(["like-source"]), help="scales and small numbers again"),
    click.option("--max-shard-size", default="5GB", show_default=True, metavar="SIZE"),
]
COST = [
    click.option("--workers", default=0, metavar="N", help="threads; default min(4, cores)"),
    click.option("--memory", default="64MiB", show_default=True, metavar="SIZE", help="bound of the buffers"),
]
LINKS = [click.option("--follow-links", is_flag=True, help="read shards through links that leave their directory")]
WRITING = [
    *COST,
    click.option("--resume", is_flag=True, help="go on with an interrupted run"),
    click.option("--overwrite", is_flag=True, help="replace what an earlier run wrote"),
    click.option("--no-sync", is_flag=True, help="leave flushing to the kernel"),
    click.option("--verify", is_flag=True, help="read the result and compare it with the source"),
    click.option("--checksums", default=None, type=click.Choice(["sha256"]), help="SHA-256 of every file, too"),
    click.option("--dry-run", is_flag=True, help="print the plan and write nothing"),
]
COMMON = [
    click.option("--json", "as_json", is_flag=True, help="one JSON object on stdout"),
    click.option("--no-progress", is_flag=True, help="no progress on stderr"),
    click.option("--quiet", is_flag=True, help="only warnings and errors"),
    click.option("--log-level", default="info", show_default=True, type=click.Choice(LEVELS)),
]


def options(*groups: list[Any]) -> Callable[[F], F]:
    """Add groups of options to a command, in order."""

    def add(function: F) -> F:
        for option in reversed([option for group in groups for option in group]):
            function = option(function)
        return function

    return add


def console(command: str, chosen: dict[str, Any], source: str | None = None, destination: str | None = None) -> Console:
    """Take the common options out of `chosen`."""
    known = {name: text for name, text in (("source", source), ("destination", destination)) if text is not None}
    as_json, quiet = chosen.pop("as_json"), chosen.pop("quiet")
    return Console(command, as_json, quiet, not chosen.pop("no_progress"), chosen.pop("log_level"), known)
