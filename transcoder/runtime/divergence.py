"""Finds the first module whose tensors differ between two implementations, from records or from their log files.

Modules are walked in the order in which megatron-core ran them. Small errors grow on their way through a model, so
what counts is a jump: an error above JUMP times the largest before it, and above JUMP times the rounding of the type.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transcoder.errors import Problem, refuse
from transcoder.runtime.sketches import distance, plain

JUMP = 8.0
ROUNDING = {"float32": 4e-6, "float64": 4e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}  # relative, of one module
_RANK = re.compile(r"(.*_fwd_log_\d+_rank_)(\d+)(\.jsonl)")
Record = dict[str, Any]
Key = tuple[str, str]  # Hugging Face module and side


@dataclass(frozen=True)
class Compared:
    """A pair of tensors and how far apart they are, relative to the reference."""

    reference: str
    module: str
    side: str
    error: float
    bound: float

    @property
    def differs(self) -> bool:
        """Whether the error is a jump, or not a number."""
        return not self.error <= self.bound

    def __str__(self) -> str:
        error = f"relative error {self.error:.2g}, bound {self.bound:.2g}"
        return f"{self.reference} <-> {self.module} ({self.side}, {error})"


@dataclass
class _Entry:
    module: str
    dtype: str
    sketches: dict[Any, list[float]]  # by tensor-parallel rank, or by record where the mean counts
    how: str

    def total(self) -> list[float]:
        """The sketch of the whole tensor."""
        columns = list(zip(*self.sketches.values(), strict=True))
        return [sum(column) / (len(column) if self.how == "experts" else 1) for column in columns]


def merged(records: Iterable[Record]) -> dict[Key, _Entry]:
    """What the ranks recorded, put together, in the order of the pipeline and of execution."""
    found: dict[Key, _Entry] = {}
    ordered = sorted(records, key=lambda each: each.get("place", {}).get("pp", 0))
    for number, record in enumerate(ordered):
        for part in record["parts"]:
            entry = found.setdefault((part["hf"], part["side"]), _Entry(record["module"], "", {}, part["how"]))
            if entry.module == record["module"]:
                rank = {"cut": record.get("place", {}).get("tp", 0), "experts": number}.get(part["how"], 0)
                entry.sketches.setdefault(rank, [float(value) for value in part["sketch"]])
                entry.dtype = entry.dtype or _dtype(record)
    return found


def _dtype(record: Record) -> str:
    return next((each["dtype"] for each in record["outputs"] if each["dtype"] in ROUNDING), "float32")


def compare(reference: Iterable[Record], ours: Iterable[Record]) -> list[Compared]:
    """Every pair, in the order of `ours`. Raises InputError when there is none."""
    theirs, found, worst = merged(reference), list[Compared](), 0.0
    for key, entry in merged(ours).items():
        if key not in theirs:
            continue
        whole = theirs[key].total()
        length = (sum(value * value for value in whole) / len(whole)) ** 0.5
        error = distance(whole, entry.total(), length)
        bound = JUMP * max(worst, ROUNDING[entry.dtype], ROUNDING[theirs[key].dtype])
        found.append(Compared(theirs[key].module, entry.module, key[1], error, bound))
        if error <= bound:  # what follows a jump differs as well
            worst = max(worst, error)
    if not found:
        raise refuse("log", "the logs have no module in common", [Problem(expected="forward logs of one model")])
    return found


def first(compared: Iterable[Compared]) -> Compared | None:
    """The first pair that differs."""
    return next((each for each in compared if each.differs), None)


def line(compared: Sequence[Compared]) -> str:
    """What is printed of the search."""
    found = first(compared)
    return f"First divergence: {found or f'none in {len(compared)} tensors'}"


def lines(compared: Sequence[Compared], every: bool) -> Iterator[str]:
    """What is printed of a search; every: a line for each pair of tensors before."""
    for each in compared if every else ():
        yield f"{'differs' if each.differs else 'equal'}: {each}"
    if compared:
        yield line(compared)


def as_json(compared: Sequence[Compared]) -> dict[str, Any]:
    """The search as `--json` tells it."""
    found = first(compared)
    table = None if found is None else {**asdict(found), "error": plain(found.error), "bound": plain(found.bound)}
    return {"tensors": len(compared), "first_divergence": table}


def read_log(path: Path) -> list[Record]:
    """The records of a log, and those of the other ranks' logs beside it. Raises InputError."""
    return [record for each in _siblings(path) for record in _read(each)]


def _siblings(path: Path) -> list[Path]:
    """The logs of all ranks of a job, in order; a log under another name alone."""
    match = _RANK.fullmatch(path.name)
    if not match:
        return [path]
    found = [each for each in path.parent.iterdir() if (m := _RANK.fullmatch(each.name)) and m[1] == match[1]]
    return sorted(found, key=lambda each: int(_RANK.fullmatch(each.name)[2])) or [path]  # type: ignore[index]


def _read(path: Path) -> Iterator[Record]:
    try:
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            record = json.loads(text)
            if not isinstance(record, dict) or not {"module", "outputs", "parts"} <= record.keys():
                problem = Problem(file=f"{path}:{number}", expected="a record of --enable_debug_hooks")
                raise refuse("log", "this is not a forward log", [problem])
            yield record
    except (OSError, ValueError) as error:
        if type(error).__module__ == "transcoder.errors":
            raise
        raise refuse("log", "a log cannot be read", [Problem(file=str(path), message=str(error))]) from error
