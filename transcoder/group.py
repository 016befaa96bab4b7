"""The command `transcode`, to which modules add theirs."""

from __future__ import annotations

import click

CONTEXT = {"token_normalize_func": lambda name: name.replace("_", "-"), "help_option_names": ["-h", "--help"]}


@click.group(context_settings=CONTEXT)
@click.version_option(package_name="megatron-transcoder")
def cli() -> None:
    """Stream weights between Hugging Face safetensors and Megatron-Core distributed checkpoints."""
