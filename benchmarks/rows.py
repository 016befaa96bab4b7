"""The table of targets: what is converted how, and what is demanded of it."""

from __future__ import annotations

from dataclasses import dataclass

from sources import MOE

# The rows of the table of targets, by the first words of each.
DENSE = "BF16, 2 workers"
ONE_WORKER = "BF16, 1 worker"
PIECES = "TP 8, row pieces"
ONE_RANK = "one rank"
DURABLE = "default durability"
COLD = "cold source"
CPU = "CPU seconds per GB"
EXPERTS = "MoE, ep 8"
FP8 = "FP8 128x128"
MXFP4 = "MXFP4"
TRANSPOSES = "transposes"
PLAN = "plan for DeepSeek-V3"
MEMORY = "peak anonymous memory"
START_UP = "start-up"
PEERS = "against the peers"
GROWTH = "cost growth"
ISSUE = (
    DENSE, ONE_WORKER, PIECES, ONE_RANK, DURABLE, COLD, CPU, EXPERTS, FP8, MXFP4, TRANSPOSES, PLAN, MEMORY, START_UP,
    PEERS, GROWTH,
)  # fmt: skip
SIZES = ("llama-0.5g", "llama-1.2g", "llama-1b", "llama-5.6g")  # growing, for cost growth and memory
COUNTS = (1_000, 10_000, 50_000)  # tensors, for cost growth


@dataclass(frozen=True)
class Variant:
    """One conversion there and back, timed against a copy.

    grid: the parallel sizes. mode: "warm" leaves flushing to the kernel, for the copy, too; "durable" ends with sync on
    both sides; "cold" is warm with nothing of the source cached. target: at most this ratio of wall times, after 0.3 s
    for starting where the mode is warm. cpu: at most this ratio of CPU seconds.
    """

    issue: str
    source: str
    grid: tuple[int, int, int]
    workers: int | None
    target: float
    cpu: float | None = None
    mode: str = "warm"
    pieces: str = ""

    @property
    def name(self) -> str:
        """For the table."""
        grid = " ".join(f"{kind} {size}" for kind, size in zip(("TP", "PP", "EP"), self.grid, strict=True) if size > 1)
        workers = "" if self.workers is None else f", {self.workers} worker{'s' if self.workers > 1 else ''}"
        mode = "" if self.mode == "warm" else f", {self.mode}"
        return f"{self.source}, {grid or 'TP 1 PP 1'}{self.pieces}{workers}{mode}"

    @property
    def options(self) -> list[str]:
        """For both conversions."""
        return [
            *([] if self.mode == "durable" else ["--no-sync"]),
            *([] if self.workers is None else ["--workers", str(self.workers)]),
        ]

    @property
    def grid_options(self) -> list[str]:
        """For the import."""
        return [
            text for name, size in zip(("tp", "pp", "ep"), self.grid, strict=True) for text in (f"--{name}", f"{size}")
        ]


FOUR = (2, 2, 1)
GROUPS: dict[str, tuple[Variant, ...]] = {
    "dense": (
        Variant(DENSE, "llama-1b", FOUR, 2, 0.75, 1.7),
        Variant(ONE_WORKER, "llama-1b", FOUR, 1, 1.1, 1.4),
        Variant(ONE_RANK, "llama-1b", (1, 1, 1), 2, 0.8, 1.7),
        Variant(DENSE, "llama-5.6g", FOUR, 2, 0.75, 1.7),
        Variant(ONE_WORKER, "llama-5.6g", FOUR, 1, 1.1, 1.4),
    ),
    "pieces": (
        Variant(PIECES, "wide", (8, 1, 1), 2, 0.8, 1.7, pieces=", row pieces of 4 and 7 KiB"),
        Variant(PIECES, "llama-1b", (8, 1, 1), 2, 1.1, 2.2, pieces=", row pieces of 0.5 and 2 KiB"),
    ),
    "durable": (Variant(DURABLE, "llama-5.6g", FOUR, None, 1.02, mode="durable"),),
    "cold": (Variant(COLD, "llama-1b", FOUR, 2, 1.1, mode="cold"),),
    "moe": (Variant(EXPERTS, MOE, (1, 1, 8), 2, 0.75, 1.7),),
}
FIXED: dict[str, tuple[str, ...]] = {  # groups that are not conversions against a copy, and the rows they make
    "kernels": (FP8, MXFP4, TRANSPOSES),
    "plan": (PLAN,),
    "memory": (MEMORY,),
    "start": (START_UP,),
    "growth": (GROWTH,),
    "peers": (PEERS,),
}


def covered() -> set[str]:
    """Which rows of the table the groups make, CPU seconds with those that have a target for them."""
    variants = [variant for group in GROUPS.values() for variant in group]
    found = {variant.issue for variant in variants} | {row for rows in FIXED.values() for row in rows}
    return found | ({CPU} if any(variant.cpu for variant in variants) else set())
