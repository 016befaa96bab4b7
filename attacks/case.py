"""What an attack is: a small function that spoils a good checkpoint, and the outcome that it must have."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from attacks.bench import Bench

MODULES = (
    "safetensors_files", "headers", "indexes", "configs", "weights", "names", "pickles", "states", "plans",
    "chunks", "archives", "records", "paths", "hubs", "destinations", "sidefiles", "layouts", "manifests", "texts",
    "arrays",
)  # fmt: skip

# What a word of `commands` stands for. {src}: the attacked folder; {good}: the model that it was made from.
COMMANDS = {
    "hf2mcore": "hf2mcore {src} {dst} --no-sync",
    "mcore2hf": "mcore2hf {src} {dst} --no-sync",
    "roundtrip": "roundtrip {src}",
    "check": "check {src}",
    "quick": "check {src} --quick",
    "inspect": "inspect {src}",
    "plan": "plan {src}",
    "verify": "verify {src} {good}",
}
CHECKERS = ("check", "verify")  # find damage, where other commands refuse input

Build = Callable[["Bench"], None]


@dataclass(frozen=True)
class Case:
    """An attack. `outcome`: reject, warn or ok; `needle`: what the message must say, a regular expression."""

    name: str
    module: str
    outcome: str
    base: str
    commands: tuple[str, ...]
    needle: str
    build: Build
    code: int

    @property
    def summary(self) -> str:
        """The attack in one line."""
        return (self.build.__doc__ or "").strip()


CASES: dict[str, Case] = {}


def attack(
    outcome: str, base: str, commands: str, needle: str = "", *more: str, code: int = 3
) -> Callable[[Build], Build]:
    """Enter the function below as a case; `commands` are words of COMMANDS, `more` whole command lines.

    `base` is what lies in the attacked folder: `hf` a model, `mcore` a checkpoint written without the tool, `made`
    one that the tool wrote, manifest included. `code` is the exit status of a refusal.
    """
    lines = (*(COMMANDS[word] for word in commands.split()), *more)

    def enter(build: Build) -> Build:
        module = build.__module__.rpartition(".")[2]
        name = f"{module}.{build.__name__}"
        assert name not in CASES, name
        CASES[name] = Case(name, module, outcome, base, lines, needle, build, code)
        return build

    return enter


def all_cases() -> dict[str, Case]:
    """Every case by name."""
    for module in MODULES:
        importlib.import_module(f"attacks.{module}")
    return CASES
