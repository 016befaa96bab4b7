"""One conversion under one fault, what must hold after it, and going on once the fault is gone."""

from __future__ import annotations

import hashlib
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fault_kinds import Call, Crash, Fault
from faults import Layer
from power import Disk, State, Tree, restore, snapshot, tree_of

import transcoder
from transcoder import InputError, OutputError, TranscoderError

PATIENCE = 30  # seconds until a run counts as hanging
NAME = "new"
Point = tuple[str, int]


@dataclass
class Scenario:
    """A conversion to `area / NAME`, what stood there before and what an undisturbed run makes of it."""

    name: str
    command: str
    source: Path
    area: Path
    options: dict[str, Any] = field(default_factory=dict)
    before: Tree = field(default_factory=dict)
    exchange: bool = True
    after: Tree = field(default_factory=dict)
    calls: list[Call] = field(default_factory=list)
    points: set[Point] = field(default_factory=set)
    faults: int = 0
    failures: list[str] = field(default_factory=list)
    resumed: dict[str, str] = field(default_factory=dict)

    def prepare(self) -> Scenario:
        """Convert once without a fault."""
        restore(self.area, self.before)
        with self.layer(Fault()) as layer:
            self.convert()
        self.calls, self.after = layer.calls, snapshot(self.area)
        assert layer.boots, "the machine's start is not looked up where it is faked"
        return self

    def layer(self, fault: Fault, *, boot: str = "first start", disk: Disk | None = None) -> Layer:
        """What the conversion runs over."""
        return Layer((self.source, self.area), fault, disk=disk, boot=boot, exchange=self.exchange)

    def convert(self, **options: Any) -> None:
        """Run it here."""
        convert = getattr(transcoder, self.command)
        with alarmed():
            convert(self.source, self.area / NAME, **self.options, **options)

    def inject(self, fault: Fault) -> bool:
        """Run with a fault and see what it leaves. Returns whether there was a call to fail."""
        restore(self.area, self.before)
        disk = Disk(self.area)
        layer = self.layer(fault, disk=disk)
        with layer:
            found = self.outcome()
        if layer.hit:
            self.points.add((self.name, fault.at))
            self.faults += 1
            self._look(fault, layer, found)
        elif found is not None:
            self._tell(fault, layer, f"failed without a fault: {found!r}")
        disk.close()
        return layer.hit is not None or fault.at <= len(layer.calls)

    def outcome(self, **options: Any) -> BaseException | None:
        """Run it and catch what it raises."""
        try:
            self.convert(**options)
        except (Crash, Exception) as error:
            return error
        return None

    def _look(self, fault: Fault, layer: Layer, found: BaseException | None) -> None:
        if not isinstance(found, Crash) and found is not None:
            if not isinstance(found, TranscoderError):
                self._tell(fault, layer, f"an error of another kind: {found!r}")
            elif not isinstance(found, self._wanted(layer)):
                self._tell(fault, layer, f"{type(found).__name__}: {found}")
        left = snapshot(self.area)  # cleaning up may fail
        if found is None and below(left) != below(self.after):
            self._tell(fault, layer, f"success with other files: {differing(left, self.after)}")
        if found is None and left != self.after and layer.hit and f"{NAME}.partial" not in layer.hit.path:
            self._tell(fault, layer, f"success that leaves {differing(left, self.after)}")
        assert layer.disk
        states = [("the process was gone", layer.disk.now(), layer.boot)]
        if isinstance(found, Crash):
            states += [(words, state, "second start") for words, state in layer.disk.states(fault.at)]
        assert tree_of(states[0][1]) == left, "the model of the disk is wrong"
        for words, state, boot in states:
            self._go_on(fault, layer, words, state, boot)

    def _wanted(self, layer: Layer) -> type[TranscoderError]:
        assert layer.hit
        return InputError if (Path(layer.hit.path) / "x").is_relative_to(self.source) else OutputError

    def _go_on(self, fault: Fault, layer: Layer, words: str, state: State, boot: str) -> None:
        """The destination is whole, and resuming gives what an undisturbed run gives."""
        tree = tree_of(state)
        if below(tree) not in (below(self.before), below(self.after)) and not self._between(below(tree)):
            changed = differing(below(tree), below(self.before)), differing(below(tree), below(self.after))
            self._tell(fault, layer, f"{words}: neither the old nor the new state: {changed}")
        if below(tree) == below(self.after) != below(self.before) and not tree.get(f"{NAME}.partial/journal"):
            return  # there is nothing to go on with
        key = digest(tree) + boot
        if key not in self.resumed:
            self.resumed[key] = self._resume(layer, state, boot)
        if self.resumed[key]:
            self._tell(fault, layer, f"{words}: resuming: {self.resumed[key]}")

    def _between(self, found: Tree) -> bool:
        """Without a system that exchanges names, what is replaced is away for a moment; what is there is as it was."""
        gone = {name for name in below(self.before) if name not in found}
        whole = {f"{NAME}/iter_0000000", f"{NAME}/config.json"} & gone
        return not self.exchange and bool(whole) and found.items() <= self.before.items()

    def _resume(self, before: Layer, state: State, boot: str) -> str:
        assert before.disk
        before.disk.make(state)
        try:
            with self.layer(Fault(), boot=boot, disk=before.disk):
                self.convert(resume=True)
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        return differing(snapshot(self.area), self.after)

    def _tell(self, fault: Fault, layer: Layer, text: str) -> None:
        call = f"{layer.hit.name} {layer.hit.path}" if layer.hit else ""
        line = f"{fault.kind} at {fault.at} (turn {fault.turn}), {call}: {text}"
        self.failures.append(line.replace(f"{self.area}/", "").replace(f"{self.source}", "SRC"))


def below(tree: Tree) -> Tree:
    """The destination alone; an empty folder is as good as none."""
    return {name: found for name, found in tree.items() if name.startswith(f"{NAME}/")}


def differing(one: Tree, two: Tree) -> str:
    """The names that differ, as text."""
    names = [name for name in sorted(one.keys() | two.keys()) if one.get(name, 0) != two.get(name, 0)]
    return ", ".join(names[:6]) + (f" and {len(names) - 6} more" if len(names) > 6 else "")


def digest(tree: Tree) -> str:
    """A text that tells trees apart."""
    return hashlib.sha256(repr(sorted(tree.items())).encode()).hexdigest()


@contextmanager
def alarmed() -> Iterator[None]:
    """A run of the main thread that takes too long is an error."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def hangs(*_: object) -> None:
        raise TimeoutError("the run hangs")

    old = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(PATIENCE)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)


def fresh(folder: Path) -> Path:
    """An empty folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder.resolve()
