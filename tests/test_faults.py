"""Every call of a conversion fails once: the destination stays whole, and going on gives what nothing would have changed.

The points that were made to fail are counted at the end of the run; `-m slow` takes every call with every fault.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest
import quantised
from fault_model import write_llama
from fault_runs import NAME, Scenario, fresh
from faults import Fault
from power import restore, snapshot

import transcoder

GRID = {"tp": 2, "pp": 2, "make_vocab_size_divisible_by": 8}
KINDS = ("crash", "error", "full", "torn", "short")
SEED = 6
# How many calls of each conversion are taken in an ordinary run, at least.
LEAST = {
    "import": 110, "export": 110, "import over": 50, "export over": 50, "import over without exchange": 50,
    "export over without exchange": 50, "import by four": 50, "export by four": 50, "quantised import": 35,
    "quantised export": 35,
}  # fmt: skip
assert sum(LEAST.values()) >= 500
Made = Callable[[str], Scenario]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Scenarios by name; bands are so small that even tiny tensors have several."""
    place = tmp_path_factory.mktemp("faults").resolve()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcoder.engine.BAND", 160)

        def make(name: str) -> Scenario:
            if "quantised" in name:
                patch.setattr("transcoder.engine.BAND", 24 << 10)
            return _scenario(name, place)

        yield make


def _scenario(name: str, place: Path) -> Scenario:
    command, source = "hf2mcore" if "import" in name else "mcore2hf", _source(name, place / "sources" / name)
    here = Scenario(name, command, source, fresh(place / name), {"workers": 4 if "four" in name else 1})
    here.options |= {"overwrite": "over" in name} | (GRID if command == "hf2mcore" else {})
    here.exchange = "without" not in name
    if "over" in name:
        _occupy(here, place / "older")
    return here.prepare()


def _source(name: str, folder: Path) -> Path:
    """What is converted: a model, or a checkpoint of it."""
    fresh(folder)
    hf = quantised.made("kimi-k2-scalar") if "quantised" in name else write_llama(folder / "hf")
    if "import" in name:
        return hf.resolve()
    transcoder.hf2mcore(hf, folder / "mcore", sync=False, **GRID)
    return folder / "mcore"


def _occupy(here: Scenario, older: Path) -> None:
    """Another model of the same architecture, and a file of somebody else's."""
    shutil.rmtree(older, ignore_errors=True)
    write_llama(older, seed=1, shards=1)
    transcoder.hf2mcore(older, here.area / "mcore", sync=False)
    if here.command == "hf2mcore":
        (here.area / "mcore").rename(here.area / NAME)
    else:
        transcoder.mcore2hf(here.area / "mcore", here.area / NAME, sync=False)
        shutil.rmtree(here.area / "mcore")
    (here.area / NAME / "notes").write_text("mine")
    here.before = snapshot(here.area)


@pytest.mark.parametrize("name", LEAST)
def test_any_call_may_fail(made: Made, name: str, record_property: Callable[[str, object], None]) -> None:
    here = made(name)
    step = len(here.calls) / LEAST[name]
    for n in range(LEAST[name] + 1):
        at = 1 + min(round(n * step), len(here.calls) - 1)
        kind = KINDS[n % len(KINDS)]
        if not Fault(at, kind).fits(here.calls[at - 1].name):
            kind = "crash" if n % 2 else "error"
        here.inject(Fault(at, kind, turn=n))
    _told(here, record_property)
    assert len(here.points) >= LEAST[name] * 0.9


def _told(here: Scenario, record_property: Callable[[str, object], None]) -> None:
    print(f"{here.name}: {here.faults} faults at {len(here.points)} of {len(here.calls)} calls, ", end="")
    print(f"{len(here.resumed)} different states resumed, seed {SEED}")
    record_property("faults", [len(here.points), here.faults])
    if here.failures:
        pytest.fail(f"{len(here.failures)} failures:\n" + "\n".join(here.failures[:40]), pytrace=False)


@pytest.mark.parametrize("name", ["import", "export"])
def test_going_on_may_fail_again_and_again(made: Made, name: str) -> None:
    _again(made(name), runs=4)


def _again(here: Scenario, runs: int) -> None:
    """Die at random calls, a few of them ends of the machine, until nothing is left to do."""
    chance = random.Random(SEED)
    for _ in range(runs):
        restore(here.area, here.before)
        for attempt in count():
            fault = Fault(chance.randint(1, len(here.calls)), chance.choice(["crash", "torn"]))
            layer = here.layer(fault, boot=f"start {attempt}", disk=True)
            with layer:
                found = here.outcome(resume=True)
            if not layer.hit:
                break
            states = [state for _, state in layer.disk.states(attempt)] if layer.disk and chance.random() < 0.5 else []
            restore(here.area, chance.choice([*states, snapshot(here.area)]))
            assert attempt < 100, found
        assert found is None, (found, attempt)
        assert snapshot(here.area) == here.after, attempt


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", LEAST)
def test_every_call_may_fail(made: Made, name: str, kind: str, record_property: Callable[[str, object], None]) -> None:
    here = made(name)
    turns = (0, 1) if kind == "error" else (0,)
    for turn in turns:
        at = 1
        while here.inject(Fault(at, kind, turn)):
            at += 1
        assert at > len(here.calls)
    _told(here, record_property)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["import", "export", "quantised import", "quantised export"])
def test_going_on_may_fail_many_times(made: Made, name: str) -> None:
    _again(made(name), runs=20)
