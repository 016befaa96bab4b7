"""Fixtures that several modules share, each module with a copy of its own; the record of what is proved."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import transcoder

collect_ignore = ["megatron"]  # programs that tests start, some of which need modules that they make themselves


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--proved`: what to do with the record."""
    parser.addoption("--proved", choices=("check", "write"), help="compare or rewrite transcoder/proved.json")


def pytest_configure(config: pytest.Config) -> None:
    """Collect claims in the process that sees every report."""
    mode = config.getoption("--proved")
    if mode and not hasattr(config, "workerinput"):
        from proving import Proving

        config.pluginmanager.register(Proving(mode))


@pytest.fixture
def proves(record_property: Callable[[str, object], None]) -> Callable[..., None]:
    """Called at the start of a test with a claim and the classes of which the test proves it."""

    def claim(name: str, *architectures: str) -> None:
        for architecture in architectures:
            record_property("proves", [name, architecture])

    return claim


@pytest.fixture(scope="module", params=["compiled", "numpy"])
def loops(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways to do the arithmetic: the compiled loops where they were built, and NumPy alone."""
    from transcoder.kernels import native

    with pytest.MonkeyPatch.context() as patch:
        if request.param == "numpy":
            patch.setattr(native, "LIBRARY", None)
        yield


@pytest.fixture(scope="module")
def mcore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint of the example model; not to be changed."""
    from command_line import EXAMPLE

    folder = tmp_path_factory.mktemp("megatron") / "mcore"
    transcoder.hf2mcore(EXAMPLE, folder)
    return folder


@pytest.fixture
def own(tmp_path: Path, mcore: Path) -> Path:
    """A Megatron checkpoint of this test's own."""
    return shutil.copytree(mcore, tmp_path / "own", symlinks=True)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An undamaged checkpoint and its source."""
    from damage import make_good

    return make_good(tmp_path_factory.mktemp("good"))


@pytest.fixture
def folder(good: Path, tmp_path: Path) -> Path:
    """An iteration directory to damage."""
    from damage import copied

    return copied(good, tmp_path)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The iteration directory of every quantised kind; not to be changed."""
    import quantised

    place = tmp_path_factory.mktemp("mcore")
    return {kind: quantised.imported(quantised.made(kind), place / kind) for kind in quantised.KINDS}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A model as `source` and what undisturbed conversions give; not to be changed."""
    from meanwhile import undisturbed

    return undisturbed(tmp_path_factory.mktemp("undisturbed"))


@pytest.fixture(params=["hf2mcore", "mcore2hf"])
def line(request: pytest.FixtureRequest, tmp_path: Path, results: dict[str, Path]) -> list[Any]:
    """A command on a source of its own."""
    command = str(request.param)
    source = results["source" if command == "hf2mcore" else "hf2mcore"]
    own = shutil.copytree(source, tmp_path / "source", symlinks=True)
    return [command, own, tmp_path / "new", *(["--tp", 2, "--pp", 2] if command == "hf2mcore" else [])]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """How many calls were made to fail, over all conversions and processes."""
    passed = terminalreporter.stats.get("passed", []) + terminalreporter.stats.get("failed", [])
    found = [value for report in passed for name, value in report.user_properties if name == "faults"]
    if found:
        points, faults = (sum(int(value[n]) for value in found) for n in range(2))
        terminalreporter.write_line(f"faults: {faults} injected at {points} distinct calls of {len(found)} conversions")
