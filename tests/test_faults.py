"""Every call of a conversion fails once: the destination stays whole, and going on gives the undisturbed result.

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
from command_line import names
from fault_kinds import Crash, Fault
from fault_model import write_llama
from fault_runs import NAME, Scenario, fresh
from power import Disk, restore, snapshot

import transcoder
import transcoder.disk

GRID = {"tp": 2, "pp": 2, "make_vocab_size_divisible_by": 8}
KINDS = ("crash", "error", "full", "torn", "short")
SEED = 6
# How many calls of each conversion are taken in an ordinary run, at least.
LEAST = {
    "import": 80, "export": 80, "import over": 50, "export over": 50, "import over without exchange": 50,
    "export over without exchange": 50, "import by four": 50, "export by four": 50, "quantised import": 25,
    "quantised export": 25, "zarr import": 25, "zarr export": 25, "zarr3 import": 20, "zarr3 export": 20,
}  # fmt: skip
assert sum(LEAST.values()) >= 500
Made = Callable[[str], Scenario]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Made]:
    """Scenarios by name; bands are so small that even tiny tensors have several."""
    place = tmp_path_factory.mktemp("faults").resolve()
    with pytest.MonkeyPatch.context() as patch:
        transcoder.disk._libc.cache_clear()  # what others looked up is not watched

        def make(name: str) -> Scenario:
            patch.setattr("transcoder.engine.BAND", 24 << 10 if "quantised" in name else 160)
            patch.setattr("transcoder.formats.zarr_writer.CAPS", {"zarr": 600, "zarr3": 300})
            return _scenario(name, place)

        yield make


def _scenario(name: str, place: Path) -> Scenario:
    command, source = "hf2mcore" if "import" in name else "mcore2hf", _source(name, place / "sources" / name)
    here = Scenario(name, command, source, fresh(place / name), {"workers": 4 if "four" in name else 1})
    here.options |= {"overwrite": "over" in name}
    here.options |= GRID | {"format": _form(name)} if command == "hf2mcore" else {}
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
    transcoder.hf2mcore(hf, folder / "mcore", format=_form(name), sync=False, **GRID)
    return folder / "mcore"


def _form(name: str) -> str:
    return next((word for word in name.split() if word.startswith("zarr")), "torch_dist")


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


@pytest.mark.parametrize("name", ["import over", "export over"])
def test_any_error_of_a_commit_over_something_leaves_the_old_or_the_new(
    made: Made, name: str, record_property: Callable[[str, object], None]
) -> None:
    here = made(name)
    for at in range(len(here.calls) - 80, len(here.calls) + 1):
        here.inject(Fault(at, "error", turn=at % 2))
    _told(here, record_property)


@pytest.mark.parametrize("name", ["import", "export"])
def test_going_on_may_fail_again_and_again(made: Made, name: str) -> None:
    _again(made(name), runs=4)


def _again(here: Scenario, runs: int) -> None:
    """Die at random calls, some of them ends of the machine, until nothing is left to do."""
    chance = random.Random(SEED)
    for _ in range(runs):
        restore(here.area, here.before)
        assert _died(here, chance) < 200
        assert snapshot(here.area) == here.after


def _died(here: Scenario, chance: random.Random) -> int:
    """How often it took."""
    for attempt in count():
        disk, fault = Disk(here.area), Fault(chance.randint(1, len(here.calls)), chance.choice(["crash", "torn"]))
        layer = here.layer(fault, boot=f"start {attempt // 2}", disk=disk)
        with layer:
            found = here.outcome(resume=True)
        if isinstance(found, Crash):
            disk.make(chance.choice([state for _, state in disk.states(attempt)]) if attempt % 2 else disk.now())
        done = names(here.area) == [NAME]
        disk.close()
        if done or not layer.hit:
            assert done, found
            return attempt
    raise AssertionError


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["import", "export"])
def test_every_call_may_fail(made: Made, name: str, kind: str, record_property: Callable[[str, object], None]) -> None:
    here, at = made(name), 1
    while here.inject(Fault(at, kind, turn=at // 7)):
        at += 1
    assert at == len(here.calls) + 1
    _told(here, record_property)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", [name for name in LEAST if " " in name])
def test_every_call_of_the_end_may_fail(made: Made, name: str, record_property: Callable[[str, object], None]) -> None:
    """Where these differ from the plain ones: flushing, links, renames and cleaning up."""
    here = made(name)
    for at in range(max(1, len(here.calls) - 110), len(here.calls) + 1):
        here.inject(Fault(at, "crash"))
        here.inject(Fault(at, "error", turn=at // 7))
    _told(here, record_property)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["import", "export", "quantised import", "quantised export"])
def test_going_on_may_fail_many_times(made: Made, name: str) -> None:
    _again(made(name), runs=20)
