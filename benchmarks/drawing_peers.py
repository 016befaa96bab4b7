"""Draws memory and time of the peers by the size of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

PANELS = ((": peak PSS", "MiB"), (": peak anonymous", "MiB"), (": wall", "s"))


def curves(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], what: str, unit: str) -> dict[str, Any]:
    """Medians by GB, for each program.

    >>> curves([{"name": "cp, tiny: wall", "unit": "s", "median": 2.0}], {"tiny": 10**9}, ": wall", "s")
    {'cp': [(1.0, 2.0)]}
    """
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if row["name"].endswith(what) and row["unit"] == unit:
            kind, source = row["name"].removesuffix(what).split(", ")
            found.setdefault(kind, []).append((sizes[source] / 1e9, row["median"]))
    return {kind: sorted(points) for kind, points in found.items()}


def draw(rows: Sequence[Mapping[str, Any]], sizes: Mapping[str, int], folder: Path) -> list[Path]:
    """As PNG and SVG."""
    from drawing import pyplot, save

    figure, places = pyplot.subplots(1, len(PANELS), figsize=(15, 4.2))
    for axes, (what, unit) in zip(places, PANELS, strict=True):
        for kind, points in curves(rows, sizes, what, unit).items():
            style = {"linewidth": 2.5} if kind.startswith("ours") else {}
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, label=kind, **style)
        axes.set(xlabel="GB of weights", ylabel=unit, title=what.removeprefix(": "))
        axes.set_ylim(bottom=0)
    places[0].legend(fontsize=7)
    figure.tight_layout()
    return save(figure, folder, "peers")
