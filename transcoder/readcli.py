"""The commands that only read: verify, check, inspect, architectures."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import click

from transcoder import phrases
from transcoder.group import cli
from transcoder.options import COMMON, LINKS, console, options

Report = dict[str, Any]


@cli.command()
@click.argument("one")
@click.argument("two")
@options(LINKS, COMMON)
def verify(one: str, two: str, **chosen: Any) -> int:
    """Compare two checkpoints of any format, logically and bit for bit."""
    from transcoder import reading

    out = console("verify", chosen, one, two)
    return out.run(
        lambda: reading.verify(one, two, **chosen),
        lambda report: [f"✅ {report['tensors']} tensors are equal bit for bit"],
    )


@cli.command()
@click.argument("directory")
@click.option("--quick", is_flag=True, help="read no payloads")
@click.option("--sample", default=100.0, type=click.FloatRange(0, 100), metavar="PERCENT", help="payloads to read")
@options(LINKS, COMMON)
def check(directory: str, quick: bool, sample: float, **chosen: Any) -> int:
    """Is this checkpoint whole: headers, coverage, checksums, digests."""
    out = console("check", chosen, directory)

    def work() -> Report:
        from transcoder import reading

        with out.bar("checking") as bar:
            return reading.check(directory, quick=quick, sample=sample, progress=bar, **chosen)

    return out.run(work, lambda report: [_whole(report)])


def _whole(report: Report) -> str:
    done = report["checked"]
    counts = f"{done['files']} files, {done['checksums']} checksums, {done['digests']} digests"
    return f"✅ {report['source']} is whole: {report['tensors']} tensors, {counts}"


@cli.command()
@click.argument("directory")
@click.option("--tree", "as_tree", is_flag=True, help="the names as a tree, alike layers and experts as one")
@click.option("--html", default=None, metavar="FILE", help="write a page that shows it all")
@options(LINKS, COMMON)
def inspect(directory: str, html: str | None, as_tree: bool, **chosen: Any) -> int:
    """Keys, dtypes, shapes, chunk grids, files, parallel layout and config of a checkpoint."""
    from transcoder import reading

    def lines(report: Report) -> Iterable[str]:
        from transcoder.inspection import table

        if html and not as_tree:
            return [f"✅ {html} shows {report['tensors']} tensors"]
        return report["tree"] if as_tree else table(report)

    out = console("inspect", chosen, directory)
    return out.run(lambda: reading.inspect(directory, html=html, as_tree=as_tree, **chosen), lines)


@cli.command()
@options(COMMON)
def architectures(**chosen: Any) -> int:
    """The supported architectures."""
    from transcoder import reading

    return console("architectures", chosen).run(reading.architectures, phrases.architectures)
