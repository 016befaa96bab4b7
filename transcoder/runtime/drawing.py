"""Draws the divergence of two models by layer: one HTML file with an SVG in it, which asks nothing of a network."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from transcoder.errors import OutputError
from transcoder.runtime.divergence import Compared, first

WIDTH, HEIGHT, LEFT, TOP = 960, 360, 64, 16
LEAST, MOST = -9, 2  # powers of ten
_LAYER = re.compile(r"\blayers\.(\d+)(?:\.|$)")
STYLE = (
    "body{font:14px sans-serif;margin:2em;color:#222}table{border-collapse:collapse}td,th{padding:2px 12px;"
    "text-align:left}td:last-child,th:last-child{text-align:right}.differs{fill:#c22;color:#c22}"
    ".same{fill:#287}line{stroke:#ddd}text{font-size:11px;fill:#555}polyline{fill:none;stroke:#999}"
)


def write(path: Path, compared: Sequence[Compared], title: str) -> None:
    """Write the drawing. Raises OutputError."""
    try:
        path.write_text(page(compared, title), encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}", kind="html") from error


def page(compared: Sequence[Compared], title: str) -> str:
    """The whole file."""
    found = first(compared)
    head = f"{found.reference} &lt;-&gt; {found.module} ({found.side})" if found else "none"
    rows = "\n".join(_row(each) for each in compared)
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>Divergence: {escape(title)}</title>'
        f"<style>{STYLE}</style></head>\n<body><h1>Divergence by layer</h1><p>{escape(title)}</p>"
        f"<p>First divergence: <b>{head}</b></p>\n{_chart(compared)}\n<table><tr><th>Hugging Face</th>"
        f"<th>Megatron</th><th>side</th><th>relative error</th></tr>\n{rows}\n</table></body></html>\n"
    )


def _row(each: Compared) -> str:
    kind = "differs" if each.differs else "same"
    cells = "".join(f"<td>{escape(text)}</td>" for text in (each.reference, each.module, each.side))
    return f'<tr class="{kind}">{cells}<td>{each.error:.2g}</td></tr>'


def _chart(compared: Sequence[Compared]) -> str:
    lines = [*_scale(), *_layers(compared), *_points(compared)]
    size = f'width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>\n' + "\n".join(lines) + "\n</svg>"


def _across(place: float, count: int) -> float:
    return LEFT + (WIDTH - LEFT - 10) * (place + 0.5) / count


def _down(error: float) -> float:
    """Where an error stands: nothing at the bottom, what is no number at the top."""
    power = MOST if math.isnan(error) else LEAST if error <= 0 else min(MOST, max(LEAST, math.log10(error)))
    return TOP + (HEIGHT - TOP - 40) * (MOST - power) / (MOST - LEAST)


def _scale() -> Iterator[str]:
    for power in range(LEAST, MOST + 1):
        height = _down(10.0**power)
        yield f'<line x1="{LEFT}" x2="{WIDTH}" y1="{height:.1f}" y2="{height:.1f}"/>'
        label = "0" if power == LEAST else f"1e{power}"
        yield f'<text x="{LEFT - 8}" y="{height + 4:.1f}" text-anchor="end">{label}</text>'


def _layers(compared: Sequence[Compared]) -> Iterator[str]:
    """A number where each layer begins."""
    seen: set[str] = set()
    for place, each in enumerate(compared):
        match = _LAYER.search(each.module)
        if match and match[1] not in seen:
            seen.add(match[1])
            x = _across(place - 0.5, len(compared))
            yield f'<line x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{HEIGHT - 40}"/>'
            yield f'<text x="{x + 3:.1f}" y="{HEIGHT - 24}">{match[1]}</text>'
    yield f'<text x="{LEFT}" y="{HEIGHT - 8}">layer; relative error of every pair, in order of execution</text>'


def _points(compared: Sequence[Compared]) -> Iterator[str]:
    places = [(_across(place, len(compared)), _down(each.error)) for place, each in enumerate(compared)]
    yield '<polyline points="' + " ".join(f"{x:.1f},{y:.1f}" for x, y in places) + '"/>'
    for (x, y), each in zip(places, compared, strict=True):
        kind = "differs" if each.differs else "same"
        name = escape(f"{each.reference} <-> {each.module} {each.side}: {each.error:.2g}")
        yield f'<circle class="{kind}" cx="{x:.1f}" cy="{y:.1f}" r="3"><title>{name}</title></circle>'
