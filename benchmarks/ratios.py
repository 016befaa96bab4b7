"""The arithmetic of the suite: paired ratios, slow moments of the machine, verdicts, lines through points."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any

SLOW = 1.8  # times the median copy: beyond it a round is marked as slow
START = 0.3  # seconds that the targets grant for starting


@dataclass(frozen=True)
class Result:
    """One row: its samples, what is aimed at, and what the machine allows.

    issue: the row of the table of targets that it belongs to. target: None where nothing is demanded; limit: in the
    same unit, and `why` says what it is. slow: for each sample, whether the copy of its round fell into the slow mode.
    """

    issue: str
    name: str
    unit: str
    samples: list[float]
    target: float | None = None
    limit: list[float] = field(default_factory=list)
    why: str = ""
    higher: bool = False
    slow: list[bool] = field(default_factory=list)
    note: str = ""

    @property
    def median(self) -> float:
        """Of all rounds."""
        return statistics.median(self.samples)

    @property
    def quiet(self) -> float | None:
        """The median of the rounds that are not slow; None where there is none, or no round is slow."""
        kept = [value for value, slow in zip(self.samples, self.slow, strict=True) if not slow] if self.slow else []
        return statistics.median(kept) if kept and len(kept) < len(self.samples) else None

    @property
    def verdict(self) -> str:
        """Whether the median of all rounds, the slow ones included, reaches the target.

        >>> Result("", "x", "s", [1.0, 3.0, 2.0], 2.0).verdict
        'ok'
        >>> Result("", "x", "GB/s", [1.0], 2.0, higher=True).verdict
        'missed'
        """
        if self.target is None:
            return "-"
        reached = self.median >= self.target if self.higher else self.median <= self.target
        return "ok" if reached else "missed"

    def record(self) -> dict[str, Any]:
        """For the file of results: every sample, and the verdict."""
        return asdict(self) | {"median": self.median, "quiet": self.quiet, "verdict": self.verdict}


def paired(walls: Sequence[float], copies: Sequence[float], start: float = 0.0) -> list[float]:
    """Each round's time over its copy's. "At most 0.75 x cp + 0.3 s" is a ratio of at most 0.75 with start 0.3.

    >>> paired([1.05, 1.3], [1.0, 2.0], START)
    [0.75, 0.5]
    """
    return [(wall - start) / copy for wall, copy in zip(walls, copies, strict=True)]


def slow_rounds(copies: Sequence[float]) -> list[bool]:
    """Which copies took more than 1.8 times the median of all of them.

    >>> slow_rounds([0.9, 1.0, 1.9, 1.1])
    [False, False, True, False]
    """
    usual = statistics.median(copies)
    return [copy > SLOW * usual for copy in copies]


def line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Slope and value at 0 of the line of least squares.

    >>> line([(0, 1), (1, 3), (2, 5)])
    (2.0, 1.0)
    """
    across, up = (statistics.fmean(values) for values in zip(*points, strict=True))
    square = sum((x - across) ** 2 for x, _ in points)
    slope = sum((x - across) * (y - up) for x, y in points) / square
    return slope, up - slope * across


def exponent(points: Sequence[tuple[float, float]]) -> float:
    """The power with which y grows with x: 1 is linear.

    >>> round(exponent([(1, 2), (2, 8), (4, 32)]), 6)
    2.0
    """
    return line([(log(x), log(y)) for x, y in points])[0]


def number(value: float | None, unit: str = "") -> str:
    """Three significant places, or a dash.

    >>> number(1234.6), number(0.12345), number(None)
    ('1,235', '0.123', '-')
    """
    if value is None:
        return "-"
    digits = max(0, 2 - int(f"{value:e}".split("e")[1]))
    return f"{value:,.{min(digits, 3)}f}{' ' + unit if unit else ''}"


def markdown(results: Sequence[Result]) -> str:
    """The table, in Markdown."""
    head = "| work | measure | median (lowest to highest) | without slow rounds | target | limit | |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- |", *map(_line, results)])


def _line(result: Result) -> str:
    spread = f"{number(result.median)} ({number(min(result.samples))} to {number(max(result.samples))})"
    sign = ">=" if result.higher else "<="
    target = "-" if result.target is None else f"{sign} {number(result.target)}"
    limit = f"{number(statistics.median(result.limit))} ({result.why})" if result.limit else "-"
    slow = f"{number(result.quiet)}, {sum(result.slow)} slow" if any(result.slow) else "no slow round"
    cells = [result.name, result.unit, spread, slow if result.slow else "-", target, limit, result.verdict]
    note = f" {result.note}" if result.note else ""
    return f"| {' | '.join(cells)}{note} |"
