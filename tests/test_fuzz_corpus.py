"""The fuzzers' corpus, every crasher included, replayed through every reader; and that findings would be noticed."""

from __future__ import annotations

import doctest
from functools import cache
from pathlib import Path
from random import Random

import pytest

from fuzz import jsons, judge, keep, limits
from fuzz.limits import TooSlow, bounded
from fuzz.targets import TARGETS, Target
from transcoder.errors import TranscoderError, refuse

KEPT = [(name, path) for name in TARGETS for path in judge.corpus(name)]
SIZE_LIMIT = 300 << 10  # bytes of the whole corpus


def made(run) -> Target:
    return Target(run, lambda rng, data: data)


@cache
def judged(name: str, path: Path) -> tuple[str, str]:
    return judge.judged(TARGETS[name], path.read_bytes())


@pytest.mark.parametrize("name", TARGETS)
def test_the_whole_corpus_is_parsed_or_refused(name):
    found = {f"{owner}/{path.name}": judged(name, path)[1] for owner, path in KEPT}
    assert {file: text for file, text in found.items() if text} == {}


@pytest.mark.parametrize("name", TARGETS)
def test_a_target_reads_a_good_file_to_its_end_and_refuses_what_is_none(name):
    outcomes = {path.name: judged(name, path)[0] for path in judge.corpus(name) if path.name.startswith("seed-")}
    assert "parsed" in outcomes.values(), outcomes
    assert judge.outcome(TARGETS[name], b"\xff\0none") == "refused"


@pytest.mark.parametrize("name", TARGETS)
def test_edits_give_inputs_that_still_reach_past_the_first_checks(name):
    seed = next(path.read_bytes() for path in judge.corpus(name) if judged(name, path)[0] == "parsed")
    target, rng = TARGETS[name], Random(1)
    edited = {target.repair(target.edit(rng, seed)) for _ in range(40)} - {seed}
    outcomes = [judge.judged(target, data) for data in edited]
    assert [text for _, text in outcomes if text] == []
    assert {kind for kind, _ in outcomes} == {"parsed", "refused"}


def test_the_corpus_stays_small():
    assert sum(path.stat().st_size for _, path in KEPT) <= SIZE_LIMIT
    assert {path.name for path in judge.CORPUS.iterdir()} == set(TARGETS), "a folder without a target, or none for one"


def fails(data: bytes) -> None:
    raise KeyError(data)


def allocates(data: bytes) -> None:
    assert len(bytearray(300 << 20)) > len(data)


def spins(data: bytes) -> None:
    while True:
        pass


def reports_a_bug(data: bytes) -> None:
    raise TranscoderError("this should not be")


def drives_the_terminal(data: bytes) -> None:
    raise refuse("x", "\x1b[31mred")


@pytest.mark.parametrize(
    ("run", "start"),
    [
        (fails, "KeyError at test_fuzz_corpus.py:fails"),
        (allocates, "MemoryError"),
        (spins, "TooSlow"),
        (reports_a_bug, "TranscoderError"),
        (drives_the_terminal, "BadMessageError"),
    ],
)
def test_everything_but_a_refusal_is_a_finding(run, start, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 0.2)
    assert judge.finding(made(run), b"x").replace(str(Path(__file__).parent) + "/", "").startswith(start)


def test_a_refusal_or_a_value_is_no_finding():
    def refuses(data: bytes) -> None:
        raise refuse("x", "no")

    assert judge.finding(made(refuses), b"") == "" == judge.finding(made(len), b"")
    assert (judge.outcome(made(refuses), b""), judge.outcome(made(len), b"")) == ("refused", "parsed")


def test_limits_end_with_the_input():
    with pytest.raises(TooSlow), bounded(seconds=0.02):
        spins(b"")
    assert len(bytearray(300 << 20)) == 300 << 20
    assert sum(range(3_000_000)) > 0


def test_shrinking_keeps_what_matters():
    assert judge.shrunk(b"a" * 40 + b"{}" + b"b" * 40, lambda data: b"{" in data and b"}" in data) == b"{}"


def test_one_small_input_is_kept_for_each_new_answer():
    def answers(data: bytes) -> None:
        if data.startswith(b"n"):
            raise refuse("x", f"no {data!r}")

    found = keep.chosen(made(answers), [b"no", b"nobody", b"yes", b"y" * 9000, b"n" * 9000], {""})
    assert found == [b"no"]


@pytest.mark.parametrize("module", [judge, jsons, keep])
def test_examples_in_the_fuzzers_documentation_run(module):
    result = doctest.testmod(module)
    assert result.attempted > 0 == result.failed
