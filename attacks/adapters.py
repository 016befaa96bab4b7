"""Adapters: expressions that take forever, numbers that are none, parts of nothing, links to somebody else's files."""

from __future__ import annotations

import json
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import GROUPS, HEAD, HEADS, HIDDEN, Tensors, numbers, table, write_file

MERGE = "hf2mcore {src} {dst} --no-sync --merge-adapter {src}/adapter"
STORE = "hf2mcore {src}/adapter {dst} --no-sync --hf-model {src}"
STEM = "base_model.model.model.layers.0.self_attn.q_proj"
CONFIG: dict[str, Any] = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj"]}


def reject(needle: str) -> Any:
    """An adapter that must be refused, whatever is to be done with it."""
    return attack("reject", "hf", "", needle, MERGE, STORE)


def parts(rank: int = 2) -> Tensors:
    """A good update of the queries of the first layer."""
    shapes = {f"{STEM}.lora_A.weight": (rank, HIDDEN), f"{STEM}.lora_B.weight": (HEADS * HEAD, rank)}
    return {name: ("BF16", shape, numbers(name, shape)) for name, shape in shapes.items()}


def write(bench: Bench, tensors: Tensors | None = None, raw: str = "", **config: Any) -> None:
    """The adapter beside the model."""
    folder = bench.source / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(raw or json.dumps(CONFIG | config))
    write_file(folder / "adapter_model.safetensors", *table(parts() if tensors is None else tensors))


@attack("warn", "hf", "", "left out", MERGE)
def inside_its_model(bench: Bench) -> None:
    """An adapter that changes nothing, in the folder of its model, whose side file its weights are not."""
    write(bench, parts() | {f"{STEM}.lora_B.weight": ("BF16", (HEADS * HEAD, 2), bytes(HEADS * HEAD * 4))})


@reject("repetitions")
def nested_repetition(bench: Bench) -> None:
    """A pattern whose search doubles with every letter."""
    write(bench, rank_pattern={"(([a-z])+.)+[A-Z]([a-z])+": 2})


@reject("repetitions")
def many_repetitions(bench: Bench) -> None:
    """A pattern with thirty stars."""
    write(bench, alpha_pattern={".*" * 30 + "x": 2})


@reject("regular expression")
def unclosed_pattern(bench: Bench) -> None:
    """A pattern that is none."""
    write(bench, rank_pattern={"q_proj(": 2})


@reject("alpha")
def infinite_alpha(bench: Bench) -> None:
    """A scale of infinity."""
    write(bench, raw=json.dumps(CONFIG).replace('"lora_alpha": 4', '"lora_alpha": 1e999'))


@reject("r = ")
def huge_rank(bench: Bench) -> None:
    """A rank that would be a loop."""
    write(bench, r=10**12)


@reject("rank")
def other_rank(bench: Bench) -> None:
    """A rank that the tensors do not have."""
    write(bench, parts(3))


@reject("rank_pattern")
def pattern_of_lists(bench: Bench) -> None:
    """A list where patterns should be."""
    write(bench, rank_pattern=[["q_proj", 2]])


@reject("LORA")
def a_list(bench: Bench) -> None:
    """A configuration that is a list."""
    write(bench, raw="[]")


@reject("lora_A and lora_B")
def half(bench: Bench) -> None:
    """An A without its B."""
    write(bench, {f"{STEM}.lora_A.weight": parts()[f"{STEM}.lora_A.weight"]})


@reject("fit no weight")
def of_nothing(bench: Bench) -> None:
    """An update of a module that the model lacks, with a name that climbs."""
    write(bench, {name.replace("layers.0", "../layers.10**9"): each for name, each in parts().items()})


@reject("fit no weight")
def no_rows(bench: Bench) -> None:
    """A B without rows."""
    write(bench, parts() | {f"{STEM}.lora_B.weight": ("BF16", (0, 2), b"")})


@reject("fit no weight")
def another_projection(bench: Bench) -> None:
    """The keys' shape under the queries' name."""
    name = f"{STEM}.lora_B.weight"
    write(bench, parts() | {name: ("BF16", (GROUPS * HEAD, 2), numbers(name, (GROUPS * HEAD, 2)))})


@reject("link|leads")
def linked(bench: Bench) -> None:
    """Weights that are a link to somebody else's."""
    write(bench)
    path = bench.source / "adapter" / "adapter_model.safetensors"
    path.rename(bench.outside / "weights.safetensors")
    path.symlink_to(bench.outside / "weights.safetensors")
