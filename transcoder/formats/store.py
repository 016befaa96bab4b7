"""An opened Megatron checkpoint of any format: where every tensor lies, before a payload byte is read."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transcoder.spec import Box, DType, TensorSpec

TRAINING_STATE = (
    *("optimizer.", "rng_state", "rerun_state_machine", "common_state", "chained_"),  # of Megatron
    *("optim.", "lr_scheduler", "scheduler.", "dataloader", "train_state"),  # of trainers that save through torch's DCP
)


@dataclass(frozen=True, slots=True)
class Item:
    """Where an item lies: file, offset and length in bytes."""

    file: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What is not read of a checkpoint: how many keys, their bytes, and what they are."""

    keys: int = 0
    nbytes: int = 0
    what: str = "training state"

    def __add__(self, other: LeftOut) -> LeftOut:
        return LeftOut(self.keys + other.keys, self.nbytes + other.nbytes, self.what)


@dataclass(frozen=True)
class Store(ABC):
    """Weight tensors with their chunks, objects, and what is not weights."""

    form: ClassVar[str]
    path: Path
    tensors: Mapping[str, tuple[DType, tuple[int, ...], tuple[tuple[Box, Item], ...]]]
    objects: Mapping[str, Item]
    ignored: Mapping[str, LeftOut]  # by the prefix of their keys
    common: Mapping[str, Any]  # plain values that are no tensors: arguments, iteration, …
    warnings: tuple[str, ...] = ()

    @property
    @abstractmethod
    def catalog(self) -> Mapping[str, TensorSpec]:
        """Every weight tensor with its payload places. Raises InputError where a file is not what it should be."""

    @property
    @abstractmethod
    def index(self) -> tuple[str, ...]:
        """Names of the files that say what there is."""

    @property
    def files(self) -> list[str]:
        """Names of the files that hold weights."""
        return sorted({item.file for _, _, places in self.tensors.values() for _, item in places})

    def left_out(self) -> list[str]:
        """A line for everything that is not read."""
        return [
            f"{each.keys} keys {prefix}* ({each.nbytes:,} bytes) are {each.what} and are left out"
            for prefix, each in sorted(self.ignored.items())
        ]


def training_state(key: str) -> str:
    """The prefix that tells that a key holds no weights; "" for weights."""
    return next((prefix for prefix in TRAINING_STATE if key.startswith(prefix)), "")
