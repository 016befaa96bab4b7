"""Draws a run: every row against its target, and how cost grows."""

from __future__ import annotations

import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot
from projection import CORES, MODELS, STORAGE, Figures, seconds

GOOD, BAD, LIMIT = "#2a7f62", "#b5432f", "#444444"
Row = Mapping[str, Any]


def relative(row: Row, value: float) -> float:
    """A value by its target, below 1 where the target is met.

    >>> relative({"target": 2.0, "higher": True}, 4.0), relative({"target": 2.0, "higher": False}, 1.0)
    (0.5, 0.5)
    """
    return float(row["target"] / value if row["higher"] else value / row["target"])


def save(figure: Any, folder: Path, name: str) -> list[Path]:
    """As PNG and SVG."""
    paths = [folder / f"{name}.{kind}" for kind in ("png", "svg")]
    for path in paths:
        figure.savefig(path, bbox_inches="tight", dpi=130)
    pyplot.close(figure)
    return paths


def draw_targets(rows: Sequence[Row], folder: Path, title: str) -> list[Path]:
    """A bar for every row that has a target: the median, all samples and the limit, as multiples of the target."""
    shown = [row for row in rows if row["target"] is not None]
    figure, axes = pyplot.subplots(figsize=(11, 1.5 + 0.24 * len(shown)))
    for place, row in enumerate(reversed(shown)):
        value = relative(row, row["median"])
        axes.barh(place, value, color=GOOD if row["verdict"] == "ok" else BAD, height=0.7, alpha=0.85)
        axes.plot([relative(row, each) for each in row["samples"]], [place] * len(row["samples"]), "k.", markersize=3)
        if row["limit"]:
            axes.plot([relative(row, statistics.median(row["limit"]))], [place], "|", color=LIMIT, markersize=11)
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_yticks(range(len(shown)), [row["name"] for row in reversed(shown)], fontsize=7)
    axes.set_xlabel("share of the target (1 = target, shorter is better); dots: rounds, |: limit or reference")
    axes.set_title(title, fontsize=9)
    return save(figure, folder, "targets")


def points(rows: Sequence[Row], pattern: str) -> dict[str, list[tuple[float, float]]]:
    """Medians of the rows whose names are a number and a step, by step."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        matched = re.fullmatch(pattern, row["name"])
        if matched:
            found.setdefault(matched[2], []).append((float(matched[1].replace(",", "")), row["median"]))
    return {step: sorted(pairs) for step, pairs in found.items()}


def workers(rows: Sequence[Row]) -> dict[str, list[tuple[float, float]]]:
    """Medians of wall over copy, by workers: TP 2 PP 2 of each source."""
    found: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        matched = re.fullmatch(r"(\S+), TP 2 PP 2, (\d) workers?: (import|export)", row["name"])
        if matched and row["unit"].startswith("(s"):
            found.setdefault(f"{matched[1]}, {matched[3]}", []).append((float(matched[2]), row["median"]))
    return {name: sorted(pairs) for name, pairs in found.items()}


def draw_scaling(rows: Sequence[Row], measured: Figures | None, folder: Path) -> list[Path]:
    """Seconds by bytes and by tensors, ratios by workers, and the projection where there is one."""
    panels = [
        ("GB", "s", points(rows, r"([\d.]+) GB, (\w+)"), "Bytes"),
        ("workers", "(s - 0.3) / cp", workers(rows), "Workers"),
        ("tensors", "s", points(rows, r"([\d,]+) tensors, (\w+)"), "Tensors"),
    ]
    panels = [panel for panel in panels if panel[2]]
    if measured:
        panels += [("GB/s of storage", "s", projected(measured), "Projection, FP8 to bfloat16")]
    if not panels:
        return []
    figure, places = pyplot.subplots(1, len(panels), figsize=(4.2 * len(panels), 3.6), squeeze=False)
    for axes, (across, up, lines, title) in zip(places[0], panels, strict=True):
        for name, pairs in lines.items():
            axes.plot(*zip(*pairs, strict=True), marker="o", markersize=3, label=name)
        if title.startswith("Projection"):
            axes.set(xscale="log", yscale="log")
        else:
            axes.set_ylim(bottom=0)
        axes.set(xlabel=across, ylabel=up, title=title)
        axes.legend(fontsize=7)
    figure.tight_layout()
    return save(figure, folder, "scaling")


def projected(measured: Figures) -> dict[str, list[tuple[float, float]]]:
    """Seconds by the storage's speed."""
    return {
        f"{model}, {cores} cores": [(speed, seconds(measured, model, cores, speed)[0]) for speed in STORAGE]
        for model in MODELS
        for cores in CORES
    }
