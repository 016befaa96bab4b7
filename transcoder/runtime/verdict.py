"""How far two sets of logits are apart, and whether that is rounding or a mistake.

In float32 the largest difference may be FLOAT32 of the logits' standard deviation. A smaller type is measured by what
it costs Hugging Face itself: against its own float32 logits of the same rounded weights, and against its logits in
that type, the largest and the root mean square difference may be SLACK times Hugging Face's own. Routers of mixtures
choose other experts after the smallest rounding, so mixtures are judged in float32 alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from transcoder.runtime.sketches import plain

FLOAT32 = 1e-4  # of the standard deviation
SLACK = 1.5
BLOCK = 64  # positions in float64 at a time


@dataclass(frozen=True)
class Measured:
    """Two sets of logits [positions, vocabulary] against each other; the first is the reference."""

    positions: int
    largest: float  # difference
    mean: float  # absolute difference
    rms: float
    std: float  # of the reference
    cosine: float  # of the worst position, at most 1
    distance: float  # 1 - cosine there
    kl: tuple[float, float]  # largest, mean over positions
    matches: int  # positions with the same best token
    undecided: int  # positions where the difference could exchange the two best

    @property
    def finite(self) -> bool:
        """Whether all differences are numbers."""
        return self.largest < float("inf")


def measure(reference: Any, ours: Any) -> Measured:
    """Compare two tensors of logits in float64."""
    parts = [
        _block(one.double(), two.double())
        for one, two in zip(reference.split(BLOCK), ours.to(reference.device).split(BLOCK), strict=True)
    ]
    found = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    count, size = reference.shape
    return Measured(
        positions=count,
        largest=float(found["largest"].max()),
        mean=float(found["absolute"].sum()) / (count * size),
        rms=(float(found["square"].sum()) / (count * size)) ** 0.5,
        std=float(reference.double().std()),
        cosine=min(1.0, float(found["cosine"].min())),
        distance=max(0.0, float((1.0 - found["cosine"]).max())),
        kl=(max(0.0, float(found["kl"].max())), max(0.0, float(found["kl"].mean()))),
        matches=int(found["match"].sum()),
        undecided=int((found["gap"] <= 2 * found["largest"]).sum()),
    )


def _block(one: Any, two: Any) -> dict[str, Any]:
    """Numbers of each position."""
    difference, best = (one - two).abs(), one.topk(2).values
    logs, others = one.log_softmax(-1), two.log_softmax(-1)
    return {
        "largest": difference.max(-1).values,
        "absolute": difference.sum(-1),
        "square": difference.square().sum(-1),
        "cosine": (one * two).sum(-1) / (one.norm(dim=-1) * two.norm(dim=-1)),
        "kl": (logs.exp() * (logs - others)).sum(-1),
        "match": one.argmax(-1) == two.argmax(-1),
        "gap": best[:, 0] - best[:, 1],
    }


@dataclass(frozen=True)
class Check:
    """One condition of a verdict."""

    what: str
    found: float
    bound: float

    @property
    def holds(self) -> bool:
        """Also false for what is no number."""
        return self.found <= self.bound

    def __str__(self) -> str:
        return f"{self.what} {self.found:.3g} {'<=' if self.holds else 'exceeds'} {self.bound:.3g}"


def wide_checks(measured: Measured) -> list[Check]:
    """What float32 logits must fulfil."""
    return [Check(f"float32: max difference in {FLOAT32:g} of std", measured.largest, FLOAT32 * measured.std)]


def narrow_checks(dtype: str, near: Measured, own: Measured, far: Measured) -> list[Check]:
    """What logits of a smaller type must fulfil.

    near: ours against Hugging Face's in that type. own: the latter against its float32. far: ours against that.
    """
    return [
        Check(f"{dtype}: {name} difference to Hugging Face in {SLACK:g} of its own error", found, SLACK * bound)
        for name, found, bound in (("max", near.largest, own.largest), ("rms", near.rms, own.rms))
    ] + [
        Check(f"{dtype}: {name} error in {SLACK:g} of Hugging Face's own", found, SLACK * bound)
        for name, found, bound in (("max", far.largest, own.largest), ("rms", far.rms, own.rms))
    ]


def as_json(measured: Measured, checks: list[Check]) -> dict[str, Any]:
    """The numbers and the conditions as `--json` tells them."""
    names = ("positions", "largest", "mean", "rms", "std", "cosine", "matches", "undecided")
    numbers = {name: plain(getattr(measured, name)) for name in names}
    kl = dict(zip(("max", "mean"), map(plain, measured.kl), strict=True))
    rows = [
        {"what": each.what, "found": plain(each.found), "bound": plain(each.bound), "holds": each.holds}
        for each in checks
    ]
    return {**numbers, "kl": kl, "checks": rows}


def verdict_lines(checks: list[Check]) -> Iterator[str]:
    """Every condition, then the verdict."""
    yield from map(str, checks)
    yield f"Verdict: {'PASS' if all(check.holds for check in checks) else 'FAIL'}"


def difference_lines(measured: Measured, same: bool) -> Iterator[str]:
    """The numbers; same: whether both choose the same next token."""
    yield f"Token match: {same}"
    yield f"Logits diff - max: {measured.largest:.6g}, mean: {measured.mean:.6g}"
    yield f"Cosine similarity: {measured.cosine:.12f}"
    yield f"Positions: {measured.positions}, same token at {measured.matches}, undecided at {measured.undecided}"
    yield f"1 - cosine: {measured.distance:.3g}"
    yield f"KL divergence - max: {measured.kl[0]:.3g}, mean: {measured.kl[1]:.3g}"
