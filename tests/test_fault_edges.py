"""Single moments of a run that the loops over all calls meet rarely or not at all."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest
from command_line import names
from fault_kinds import Call, Crash, Fault
from fault_model import write_llama
from fault_runs import NAME, Scenario, fresh
from faults import Layer
from power import Disk, restore, snapshot

import transcoder
from transcoder import OutputError

Lines = list[tuple[int, Call]]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Scenario:
    """A plain import with many bands."""
    monkeypatch.setattr("transcoder.engine.BAND", 160)
    source = write_llama(tmp_path.resolve() / "hf")
    options = {"tp": 2, "pp": 2, "make_vocab_size_divisible_by": 8, "workers": 1}
    return Scenario("import", "hf2mcore", source, fresh(tmp_path / "area"), options).prepare()


def _calls(here: Scenario, *wanted: str) -> Lines:
    return [(n + 1, call) for n, call in enumerate(here.calls) if call.name in wanted]


def test_the_lock_goes_last(here: Scenario) -> None:
    """Whoever finds no lock finds nothing that is still to be removed; there is no lease here."""
    gone = [call.path for _, call in _calls(here, "unlink", "remove") if not call.path.endswith("/lease")]
    assert gone[-1] == f"{here.area / NAME}.partial/lock"


def test_without_flushing_a_restart_begins_anew(here: Scenario) -> None:
    here.options["sync"] = False
    here.prepare()
    rename = next(n for n, call in _calls(here, "rename", "replace") if call.path == str(here.area / NAME))
    restore(here.area, here.before)
    disk = Disk(here.area)
    with here.layer(Fault(rename, "crash"), disk=disk):
        assert isinstance(here.outcome(), Crash)
    disk.make(dict(disk.states())["no unflushed data"])
    with here.layer(Fault(), boot="second start", disk=disk):
        here.convert(resume=True)
    assert snapshot(here.area) == here.after
    disk.close()


def test_data_is_flushed_before_the_rename_and_folders_around_it(here: Scenario) -> None:
    """The order of a commit: payloads, small files, trackers, their folders, the rename, the folder above."""
    out, above = f"{here.area / NAME}.partial/out", str(here.area)
    rename = next(n for n, call in _calls(here, "rename", "replace") if call.path == str(here.area / NAME))
    flushed = {call.path: n for n, call in _calls(here, "fsync", "fdatasync")}
    wrote = {call.path: n for n, call in _calls(here, "pwrite", "write")}
    made = [path for path, found in here.after.items() if not isinstance(found, str)]
    for path in (path.replace(NAME, out, 1) for path in made):
        assert wrote.get(path, 0) < flushed[path] < rename, path
    metadata, tracker = f"{out}/iter_0000000/metadata.json", f"{out}/latest_checkpointed_iteration.txt"
    assert max(n for path, n in wrote.items() if path.endswith(".distcp")) < wrote[metadata] < wrote[tracker]
    assert flushed[metadata] < wrote[tracker]
    assert flushed[above] > rename


@pytest.fixture
def lockless(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A file system without locks; the number in the list is the error."""
    number, real = [errno.ENOLCK], fcntl.flock

    def flock(file: int, operation: int) -> None:
        if number[0]:
            raise OSError(number[0], os.strerror(number[0]))
        real(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    return number


def _beside(here: Scenario, numbers: tuple[int, int], lockless: list[int]) -> None:
    """Start a second run within the first."""
    seen: list[BaseException] = []

    def listen(progress: object) -> None:
        if not seen:
            lockless[0] = numbers[1]
            with pytest.raises(OutputError) as found:
                here.convert(resume=True)
            seen.append(found.value)

    restore(here.area, {})
    lockless[0] = numbers[0]
    here.convert(progress=listen)
    assert "process" in str(seen[0])
    assert str(os.getpid()) in str(seen[0])
    assert snapshot(here.area) == here.after


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_where_there_are_no_locks_a_lease_keeps_others_out(here: Scenario, lockless: list[int], number: int) -> None:
    _beside(here, (number, number), lockless)


def test_a_lease_keeps_out_a_run_that_could_have_the_lock(here: Scenario, lockless: list[int]) -> None:
    _beside(here, (errno.ENOLCK, 0), lockless)


def test_a_lock_that_cannot_be_asked_for_is_four(here: Scenario, lockless: list[int]) -> None:
    restore(here.area, {})
    lockless[0] = errno.EIO
    with pytest.raises(OutputError):
        here.convert()
    assert names(here.area) == []


def test_the_layer_sees_what_the_system_does(tmp_path: Path) -> None:
    """Everything that is counted happens below the folder, and nothing changes there that is not counted."""
    source, area = write_llama(tmp_path.resolve() / "hf"), fresh(tmp_path / "area")
    disk = Disk(area)
    with Layer((source, area), disk=disk) as layer:
        transcoder.hf2mcore(source, area / NAME, tp=2, pp=2)
    assert {name: found for name, (_, found) in disk.now().items()} == snapshot(area)
    assert all(call.path.startswith((str(source), str(area))) for call in layer.calls)
    disk.close()


def test_the_layer_loses_what_nobody_flushed(tmp_path: Path) -> None:
    area = fresh(tmp_path / "area")
    disk = Disk(area)
    with Layer((area,), disk=disk):
        for name in ("flushed", "lost"):
            file = os.open(area / name, os.O_CREAT | os.O_WRONLY)
            os.write(file, b"first")
            if name == "flushed":
                os.fsync(file)
                os.write(file, b"second")
            os.close(file)
        folder = os.open(area, os.O_RDONLY)
        os.fsync(folder)
        (area / "lost").rename(area / "renamed")
        os.close(folder)
    states = {words: {name: found for name, (_, found) in state.items()} for words, state in disk.states()}
    assert states["nothing unflushed"] == {"flushed": b"first", "lost": b""}
    assert states["no unflushed entries"] == {"flushed": b"firstsecond", "lost": b"first"}
    assert states["no unflushed data"] == {"flushed": b"first".ljust(11, b"\0"), "renamed": bytes(5)}
    disk.make(dict(disk.states())["no unflushed data"])
    assert snapshot(area) == states["no unflushed data"]
    disk.close()
