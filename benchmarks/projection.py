"""How long larger models would take on larger machines, by arithmetic from measured figures; never a measurement."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

MODELS = {  # GB of FP8 files, GB as bfloat16, size against DeepSeek-V3 for planning
    "671B": (689.0, 1342.0, 1.0),
    "1T": (1027.0, 2000.0, 1.49),
}
CORES = (2, 64)
STORAGE = (0.8, 4.0, 40.0)  # GB/s
ASSUMPTIONS = (
    "FP8 files become bfloat16; CPU seconds = GB of bfloat16 x (CPU s/GB of a bfloat16 import, 2 workers, + 1 / GB/s "
    "of the FP8 kernel on one core)",
    "cores add up without loss: not measured beyond two, and memory bandwidth will end it earlier",
    "the storage reads and writes at its speed at the same time, so the larger of the two counts",
    "moving and computing overlap: the slower of the two decides; planning and `.metadata` are added",
    "1T: 1,000 x 10^9 parameters with the names, scales and tensors per byte of the 671B model",
)


@dataclass(frozen=True)
class Figures:
    """Measured: CPU s/GB of bfloat16, GB/s of one core's FP8 decoding, seconds to plan 671B and for .metadata."""

    cpu: float
    decode: float
    plan: float
    metadata: float


def figures(rows: Sequence[Mapping[str, Any]]) -> Figures | None:
    """From the rows of a run; None where one of them was not taken."""
    wanted = (
        ("llama-5.6g, TP 2 PP 2, 2 workers: import, CPU", "s/GB"),
        ("FP8 decode, 128 x 128, compiled", "GB/s"),
        ("DeepSeek-V3, TP 8 PP 16 EP 32: plan and proof", "s"),
        ("DeepSeek-V3, TP 8 PP 16 EP 32: .metadata", "s"),
    )
    medians = {(row["name"], row["unit"]): float(row["median"]) for row in rows}
    return Figures(*(medians[key] for key in wanted)) if all(key in medians for key in wanted) else None


def seconds(measured: Figures, model: str, cores: int, storage: float) -> tuple[float, str]:
    """Seconds of a whole conversion, and what bounds it.

    >>> seconds(Figures(0.5, 5.0, 2.0, 1.0), "671B", 2, 40.0)
    (472.7, 'processor')
    >>> seconds(Figures(0.5, 5.0, 2.0, 1.0), "671B", 64, 0.8)
    (1680.5, 'storage')
    """
    stored, values, size = MODELS[model]
    computing = values * (measured.cpu + 1 / measured.decode) / cores
    moving = max(stored, values) / storage
    total = max(computing, moving) + size * (measured.plan + measured.metadata)
    return round(total, 1), "processor" if computing > moving else "storage"


def table(measured: Figures) -> str:
    """In Markdown, with the assumptions below."""
    head = ["| model | cores | " + " | ".join(f"{speed:g} GB/s" for speed in STORAGE) + " |"]
    head.append("| --- | --- |" + " --- |" * len(STORAGE))
    for model in MODELS:
        for cores in CORES:
            cells = [seconds(measured, model, cores, speed) for speed in STORAGE]
            head.append(
                f"| {model} | {cores} | " + " | ".join(f"{time:,.0f} s, {bound}" for time, bound in cells) + " |"
            )
    given = f"CPU {measured.cpu:.2f} s/GB, FP8 {measured.decode:.1f} GB/s a core, plan {measured.plan:.2f} s, "
    given += f".metadata {measured.metadata:.2f} s"
    return "\n".join([*head, "", f"Computed from: {given}. Assumed:", *(f"- {text}" for text in ASSUMPTIONS)])
