"""The command line: parse, call, print."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from io import TextIOWrapper
from typing import Any

import click

from transcoder import phrases, readcli
from transcoder.console import Console
from transcoder.errors import PathLike, UsageError
from transcoder.group import cli
from transcoder.options import (
    ARCH,
    COMMON,
    COST,
    DTYPE,
    GRID,
    HUGGING_FACE,
    LINKS,
    LORA,
    MEGATRON,
    MERGE,
    MTP,
    REFERENCE,
    RESHAPE,
    WRITING,
    console,
    options,
)

Report = dict[str, Any]
IMPORT = (GRID, MEGATRON, MTP, DTYPE, ARCH, MERGE, LINKS, WRITING, COMMON)
EXPORT = (HUGGING_FACE, DTYPE, ARCH, MERGE, LINKS, WRITING, COMMON)


@cli.command()
@click.argument("src")
@click.argument("dst")
@options(*IMPORT, REFERENCE, LORA)
def hf2mcore(src: str, dst: str, **chosen: Any) -> int:
    """Hugging Face directory → Megatron distributed checkpoint."""
    return _import("hf2mcore", src, dst, chosen)


@cli.command("import")
@click.option("--hf-model", required=True, metavar="DIR", help="the Hugging Face directory")
@click.option("--megatron-path", required=True, metavar="DIR", help="the checkpoint to write")
@click.option("--torch-dtype", default=None, type=click.Choice(["bfloat16", "float16", "float32"]))
@click.option("--device-map", default=None, help="accepted and not needed: no device holds the model")
@options(*IMPORT)
def import_(hf_model: str, megatron_path: str, torch_dtype: str | None, device_map: str | None, **chosen: Any) -> int:
    """hf2mcore, under the name that Megatron Bridge's scripts use."""
    chosen["dtype"] = torch_dtype or chosen["dtype"]
    return _import("import", hf_model, megatron_path, chosen, _needless(device_map))


def _needless(device_map: str | None) -> list[str]:
    return [] if device_map is None else ["--device-map is not needed: no device ever holds the model"]


def _import(command: str, src: str, dst: str, chosen: Report, warnings: Iterable[str] = ()) -> int:
    out = console(command, chosen, src, dst)

    def work() -> Report:
        from transcoder import api
        from transcoder.planning import plan_hf2mcore

        dry, arguments = _writing(chosen)
        if dry:
            return _plan(plan_hf2mcore, src, arguments, "hf2mcore") | {"destination": dst}
        out.say(phrases.import_start(src, dst))
        with out.bar("importing") as bar:
            report = api.hf2mcore(src, dst, progress=bar, **arguments)
        return report | {"warnings": [*warnings, *report["warnings"]]}

    return out.run(work, lambda report: _planned(report) if "text" in report else phrases.import_end(report))


def _writing(chosen: Report) -> tuple[bool, Report]:
    """Whether it is a dry run, and the arguments of the API."""
    arguments = {name: value for name, value in chosen.items() if value is not None}
    if "no_sync" in arguments:
        arguments["sync"] = not arguments.pop("no_sync")
    if "iteration" in arguments:
        arguments["iteration"] = _iteration(arguments["iteration"])
    return arguments.pop("dry_run", False), arguments


def _iteration(text: str) -> int | str:
    if text in ("both", "release"):
        return text
    if not text.isascii() or not text.isdigit() or int(text) >= 10**7:
        raise UsageError(f"--iteration {text}: give both, release or a number", kind="iteration")
    return int(text)


def _plan(planner: Callable[..., Any], src: PathLike, arguments: Report, command: str) -> Report:
    from inspect import signature

    from transcoder.converting import worker_count
    from transcoder.description import Plan
    from transcoder.reports import size_of

    worker_count(arguments["workers"], arguments["memory"])
    names = signature(planner).parameters
    kept = {name: value for name, value in arguments.items() if name in names}
    return Plan(command, planner(src, **kept), size_of(arguments["memory"])).report


def _planned(report: Report) -> Iterator[str]:
    yield report["text"]


@cli.command()
@click.argument("src")
@click.argument("dst")
@options(*EXPORT)
def mcore2hf(src: str, dst: str, **chosen: Any) -> int:
    """Megatron checkpoint → Hugging Face directory."""
    return _export("mcore2hf", src, dst, chosen)


@cli.command()
@click.option("--megatron-path", required=True, metavar="DIR", help="the Megatron checkpoint")
@click.option("--hf-path", required=True, metavar="DIR", help="the Hugging Face directory to write")
@options(*EXPORT)
def export(megatron_path: str, hf_path: str, **chosen: Any) -> int:
    """mcore2hf, under the name that Megatron Bridge's scripts use."""
    return _export("export", megatron_path, hf_path, chosen)


def _export(command: str, src: str, dst: str, chosen: Report) -> int:
    out = console(command, chosen, src, dst)

    def work() -> Report:
        from transcoder import api
        from transcoder.planning import plan_mcore2hf

        dry, arguments = _writing(chosen)
        if dry:
            return _plan(plan_mcore2hf, src, arguments, "mcore2hf") | {"destination": dst}
        out.say(phrases.export_start(src, dst))
        with out.bar("exporting") as bar:
            return api.mcore2hf(src, dst, progress=bar, **arguments)

    return out.run(work, lambda report: _planned(report) if "text" in report else phrases.export_end(report))


@cli.command()
@click.argument("src")
@click.argument("dst")
@options(GRID, RESHAPE, DTYPE, ARCH, REFERENCE, WRITING, COMMON)
def reshard(src: str, dst: str, **chosen: Any) -> int:
    """Megatron checkpoint → another grid, key dialect or dtype."""
    out = console("reshard", chosen, src, dst)

    def work() -> Report:
        from transcoder import api
        from transcoder.planning import plan_reshard

        dry, arguments = _writing(chosen)
        if dry:
            return _plan(lambda *a, **k: plan_reshard(*a, **k).target, src, arguments, "reshard") | {"destination": dst}
        with out.bar("resharding") as bar:
            return api.reshard(src, dst, progress=bar, **arguments)

    return out.run(work, lambda report: _planned(report) if "text" in report else phrases.reshard_end(report))


@cli.command()
@click.argument("src", required=False)
@click.argument("dst", required=False)
@click.option("--hf-model-id", default=None, metavar="DIR", help="SRC, under its older name")
@click.option("--output-dir", default=None, metavar="DIR", help="DST, under its older name")
@click.option("--megatron-save-path", default=None, metavar="DIR", help="write the Megatron checkpoint, too")
@click.option("--megatron-load-path", default=None, metavar="DIR", help="go through this Megatron checkpoint")
@click.option("--overwrite", is_flag=True, help="replace what an earlier run wrote")
@options(GRID, ARCH, LINKS, COST, COMMON)
def roundtrip(src: str | None, dst: str | None, hf_model_id: str | None, output_dir: str | None, **chosen: Any) -> int:
    """There and back, every bit compared; without DST nothing is written."""
    out = console("roundtrip", chosen, src or hf_model_id, dst or output_dir)

    def work() -> Report:
        from transcoder import api

        source = src or hf_model_id
        if source is None:
            raise UsageError("give a Hugging Face directory: transcode roundtrip SRC [DST]", kind="usage")
        with out.bar("round trip") as bar:
            return api.roundtrip(source, dst or output_dir, progress=bar, **chosen)

    return out.run(work, phrases.roundtrip_end)


@cli.command()
@click.argument("src")
@options(GRID, MEGATRON, MTP, HUGGING_FACE, DTYPE, ARCH, MERGE, LORA, LINKS, COST, COMMON)
def plan(src: str, **chosen: Any) -> int:
    """What hf2mcore or mcore2hf would do, from headers alone."""
    out = console("plan", chosen, src)

    def work() -> Report:
        from transcoder import planning
        from transcoder.formats.huggingface import is_hf
        from transcoder.places import place

        _, arguments = _writing(chosen)
        source = place(src)
        planner = planning.plan_hf2mcore if is_hf(source) else planning.plan_mcore2hf
        return _plan(planner, source, arguments, planner.__name__.removeprefix("plan_"))

    return out.run(work, _planned)


COMMANDS = (readcli,)  # that add themselves to the group


def main() -> None:
    """The entry point of `transcode`: usage errors keep the JSON promise, too."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # names and phrases that the terminal cannot show
    try:
        status = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except click.Abort:
        status = 130
    except click.ClickException as error:
        status = _usage(error)
    sys.exit(status or 0)


def _usage(error: click.ClickException) -> int:
    context = getattr(error, "ctx", None)
    if isinstance(error, click.exceptions.NoArgsIsHelpError):
        click.echo(error.format_message(), err=True)
        return 2
    out = Console(context.info_name if context and context.parent else "transcode", "--json" in sys.argv)
    hint = f"{error.format_message()} (see {context.command_path} --help)" if context else error.format_message()
    return out.fail(hint, 2, {"code": 2, "kind": "usage", "message": hint, "problems": []}, {})
