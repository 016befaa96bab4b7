"""The parallel grid: how many ranks, which rank stores a chunk, which pipeline stage has a layer.

Rank numbering is Megatron's default order tp-ep-dp-pp (megatron/core/parallel_state.py): within a pipeline stage the
dense rank is tp + TP·dp; chunks of dense tensors are stored by data-parallel rank 0.
"""

from __future__ import annotations

from collections.abc import Mapping
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
        return {"tp": self.tp, "ep": self.ep, "etp": self.etp}

    @cached_property
    def stage_ranks(self) -> int:
        """Ranks of one pipeline stage: tp · dp, with the smallest dp that ep · etp divides."""
        dp = next(n for n in range(1, self.ep * self.etp + 1) if (self.tp * n) % (self.ep * self.etp) == 0)
        return self.tp * dp

    @property
    def world(self) -> int:
        """Number of ranks."""
        return self.stage_ranks * self.pp

    def rank(self, stage: int, at: Mapping[str, int]) -> int:
        """The rank that stores a chunk of `stage` with the mesh coordinates `at`."""
        return stage * self.stage_ranks + at.get("tp", 0) + at.get("etp", 0) + self.etp * at.get("ep", 0)

    def stage(self, layer: int, layers: int) -> int:
        """The pipeline stage of a layer; the first `layers % pp` stages have one layer more.

        >>> [Mesh(pp=2).stage(layer, 5) for layer in range(5)]
        [0, 0, 0, 1, 1]
        """
        small, larger = divmod(layers, self.pp)
        if layer < larger * (small + 1):
            return layer // (small + 1)
        return larger + (layer - larger * (small + 1)) // small

    def check(self, facts: Mapping[str, int]) -> None:
        """Raise UsageError naming the sizes that fit, when heads, ffn or layers do not fit the grid."""
        for option, size in (("tp", self.tp), ("pp", self.pp), ("ep", self.ep), ("etp", self.etp)):
            if size < 1:
                raise UsageError(f"--{option} {size}: give a number of 1 or more", kind="mesh")
        for name in ("attention heads", "ffn size"):
            if facts[name] % self.tp:
                fits = ", ".join(
                    str(n) for n in range(1, 129) if all(facts[key] % n == 0 for key in facts if key != "layers")
                )
                raise UsageError(
                    f"--tp {self.tp} does not divide the {facts[name]} {name}; values that fit: {fits}", kind="mesh"
                )
        if self.pp > facts["layers"]:
            raise UsageError(
                f"--pp {self.pp}: the model has {facts['layers']} layers; values that fit: 1 to {facts['layers']}",
                kind="mesh",
            )
        if self.ep * self.etp > 1:
            raise UsageError("--ep and --etp: this model has no experts; the value that fits is 1", kind="mesh")
