"""How far a run is: counted by workers, shown as a bar on a terminal or as a line every ten seconds."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TextIO

from transcoder.errors import LISTED_PROBLEMS
from transcoder.planner import HfTensor, Model

INTERVAL = {True: 0.1, False: 10.0}  # seconds between two updates, by whether a terminal reads them


@dataclass(frozen=True, slots=True)
class Progress:
    """What a progress callback is given: payload bytes of the Hugging Face side, Megatron parameters."""

    bytes_done: int
    bytes_total: int
    parameters_done: int
    parameters_total: int


Listener = Callable[[Progress], None]


class Cancelled(BaseException):
    """Another worker failed, or a signal came: this one ends, too. Not an Exception: nobody else is to catch it."""


class Tally:
    """Counts bytes and finished Megatron parameters (one per layer and name); thread-safe; one listener.

    It is where workers learn that the run is to end.
    """

    def __init__(self, model: Model, total: int, listener: Listener | None = None) -> None:
        self._total = total
        self._families = {id(family): (family.parameters, family.tensors) for family in model.families}
        self._finished = dict.fromkeys(self._families, 0)
        self._bytes = 0
        self._listener = listener
        self.odd: set[str] = set()  # tensors that hold NaN or infinity
        self.stop = threading.Event()  # set when somebody wants the run to end
        self._lock = threading.Lock()

    @property
    def share(self) -> float:
        """How much is done, of 1."""
        return self._bytes / self._total if self._total else 1.0

    def moved(self, size: int) -> None:
        """`size` more payload bytes have reached their place. Raises Cancelled when the run is to end."""
        if self.stop.is_set():
            raise Cancelled
        with self._lock:
            self._bytes += size
            self._tell()

    def warnings(self) -> list[str]:
        """What users should know of the values that passed."""
        names = sorted(self.odd)
        lines = [f"{name} holds NaN or infinity, converted bit for bit" for name in names[:LISTED_PROBLEMS]]
        rest = len(names) - LISTED_PROBLEMS
        return [*lines, f"… and {rest} more tensors hold NaN or infinity"] if rest > 0 else lines

    def finished(self, tensor: HfTensor, odd: bool = False) -> None:
        """A Hugging Face tensor is complete. odd: it holds NaN or infinity."""
        with self._lock:
            self.odd |= {tensor.name} if odd else set()
            self._finished[id(tensor.family)] += 1
            self._tell()

    def _tell(self) -> None:
        if self._listener is not None:
            parts = [(whole, count, self._finished[f]) for f, (whole, count) in self._families.items()]
            done = sum(whole * finished // count if count else whole for whole, count, finished in parts)
            self._listener(Progress(self._bytes, self._total, done, sum(whole for whole, _, _ in parts)))


class Bar:
    """A listener that writes progress to a stream: in place on a terminal, else line by line."""

    def __init__(self, label: str, stream: TextIO = sys.stderr) -> None:
        self._label, self._stream = label, stream
        self._terminal = stream.isatty()
        self._started = self._shown = time.monotonic()
        self._open = False

    def __call__(self, state: Progress) -> None:
        now = time.monotonic()
        if now - self._shown < INTERVAL[self._terminal]:
            return
        self._shown = now
        text = f"{self._label} {line(state, now - self._started)}"
        self._stream.write(f"\r{text}\x1b[K" if self._terminal else f"{text}\n")
        self._stream.flush()
        self._open = self._terminal

    def close(self) -> None:
        """Leave the terminal's cursor on a fresh line."""
        if self._open:
            self._stream.write("\r\x1b[K")
            self._stream.flush()


def line(state: Progress, seconds: float) -> str:
    """Share done, parameters done, bytes per second and time left.

    >>> line(Progress(3 * 10**9, 4 * 10**9, 70, 98), 6.0)
    ' 75% (70/98) 500.0 MB/s, 2 s left'
    """
    share = state.bytes_done / state.bytes_total if state.bytes_total else 1.0
    speed = state.bytes_done / seconds if seconds else 0.0
    left = f"{(state.bytes_total - state.bytes_done) / speed:.0f} s left" if speed else "time left unknown"
    return f"{share:4.0%} ({state.parameters_done}/{state.parameters_total}) {speed / 1e6:.1f} MB/s, {left}"
