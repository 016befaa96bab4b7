"""The parallel grid: how many ranks, which rank stores a chunk, which pipeline stage has a layer.

Rank numbering is Megatron's default order tp-ep-dp-pp (megatron/core/parallel_state.py): within a pipeline stage the
dense rank is tp + TP·dp; chunks of dense tensors are stored by data-parallel rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from transcoder.errors import UsageError


@dataclass(frozen=True)
class Mesh:
    """Sizes of tensor, pipeline, expert and expert-tensor parallelism."""

    tp: int = 1
    pp: int = 1
    ep: int = 1
    etp: int = 1

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The sizes by the names that layouts use."""
        return {"tp": self.tp, "etp": self.etp}

    @cached_property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: tp · dp, with the smallest dp that ep · etp divides."""
        dp = next(n for n in range(1, self.ep * self.etp + 1) if (self.tp * n) % (self.ep * self.etp) == 0)
        return self.tp * dp

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.stage_ranks * self.pp

    def rank(self, stage: int, at: Mapping[str, int], experts: int = 1) -> int:
        """The rank that stores a chunk of `stage`; `at`: its coordinates on `tp` and `etp`, and its expert `e`.

        >>> Mesh(tp=2, ep=2).rank(0, {"e": 5}, experts=8)
        1
        """
        expert_rank = at.get("e", 0) * self.ep // experts
        return stage * self.stage_ranks + at.get("tp", 0) + at.get("etp", 0) + self.etp * expert_rank

    def stage(self, layer: int, layers: int) -> int:
        """The pipeline stage of a layer; the first `layers % pp` stages have one layer more.

        >>> [Mesh(pp=2).stage(layer, 5) for layer in range(5)]
        [0, 0, 0, 1, 1]
        """
        small, larger = divmod(layers, self.pp)
        if layer < larger * (small + 1):
            return layer // (small + 1)
        return larger + (layer - larger * (small + 1)) // small

    def check_positive(self) -> None:
        """Raise UsageError for a size below 1."""
        for option in ("tp", "pp", "ep", "etp"):
            if getattr(self, option) < 1:
                raise UsageError(f"--{option} {getattr(self, option)}: give a number of 1 or more", kind="mesh")

    def check(self, limits: Iterable[tuple[str, str, int]], layers: int) -> None:
        """Raise UsageError naming the sizes that fit, when a part of the model does not fit the grid.

        limits: (mesh, what it cuts, how many of these there are).
        """
        for mesh, noun, count in (rows := sorted(set(limits))):
            if count % getattr(self, mesh):
                counts = [other for name, _, other in rows if name == mesh]
                fits = ", ".join(str(n) for n in range(1, 257) if all(other % n == 0 for other in counts))
                message = f"--{mesh} {getattr(self, mesh)} does not divide the {count} {noun}; values that fit: {fits}"
                raise UsageError(message, kind="mesh")
        if self.pp > layers:
            message = f"--pp {self.pp}: the model has {layers} layers; values that fit: 1 to {layers}"
            raise UsageError(message, kind="mesh")
        if self.ep * self.etp > 1 and not any(mesh == "ep" for mesh, _, _ in rows):
            raise UsageError("--ep and --etp: this model has no experts; the value that fits is 1", kind="mesh")
