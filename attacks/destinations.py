"""Destinations that are links, that lie in the source, or that are taken: refused, and nothing is changed."""

from __future__ import annotations

from typing import Any

from attacks.bench import Bench
from attacks.case import attack


def taken(needle: str = "", *lines: str) -> Any:
    """A destination that must be refused: status 4; one that the command line alone condemns: 2."""
    return attack("reject", "hf", "", needle, *(lines or ("hf2mcore {src} {dst} --no-sync",)), code=4)


@taken("link")
def link_to_a_folder_outside(bench: Bench) -> None:
    """DST is a link to an empty folder of somebody else."""
    (bench.outside / "empty").mkdir()
    (bench.out / "dst").symlink_to(bench.outside / "empty")


@taken("link")
def link_to_nothing(bench: Bench) -> None:
    """DST is a link to a place where a folder could be made."""
    (bench.out / "dst").symlink_to(bench.outside / "new")


@taken("", "hf2mcore {src} {dst} --no-sync", "hf2mcore {src} {dst} --no-sync --overwrite")
def work_folder_is_a_link(bench: Bench) -> None:
    """`DST.partial` is a link to a folder of somebody else."""
    (bench.out / "dst.partial").symlink_to(bench.stranger)


@taken("not empty|exists|overwrite")
def not_empty(bench: Bench) -> None:
    """DST holds files already."""
    (bench.out / "dst").mkdir()
    (bench.out / "dst" / "thesis.tex").write_text("years of work")


@taken("")
def is_a_file(bench: Bench) -> None:
    """DST is a file."""
    (bench.out / "dst").write_text("years of work")


@taken("")
def parent_is_a_file(bench: Bench) -> None:
    """DST's parent is a file."""
    (bench.out / "dst").write_text("years of work")


@attack(
    "reject", "hf", "", "inside|source", "hf2mcore {src} {src}/dst --no-sync", "hf2mcore {src} {src} --no-sync", code=2
)
def inside_the_source(bench: Bench) -> None:
    """DST lies in SRC."""


@attack("reject", "hf", "", "inside|source|contain", "hf2mcore {src} {place} --no-sync", code=2)
def around_the_source(bench: Bench) -> None:
    """SRC lies in DST."""


@attack("reject", "hf", "", "inside|source", "hf2mcore {src} {place}/alias/dst --no-sync", code=2)
def inside_the_source_through_a_link(bench: Bench) -> None:
    """DST lies in SRC, spelled through a link."""
    (bench.place / "alias").symlink_to("source")


@attack("reject", "mcore", "", "inside|source", "mcore2hf {src} {folder}/dst --no-sync", code=2)
def inside_a_checkpoint(bench: Bench) -> None:
    """DST lies in the iteration's folder."""


@attack("ok", "hf", "hf2mcore")
def ordinary(bench: Bench) -> None:
    """A name that is not taken, in a folder that exists."""
