"""Results on stdout, messages on stderr, one JSON object for machines, and the exit status for both."""

from __future__ import annotations

import json
import os
import signal
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from transcoder.errors import TranscoderError, printable

if TYPE_CHECKING:
    from transcoder.progress import Listener

LINE = 400  # characters of a line of a message
LEVELS = ("debug", "info", "warning", "error")
FIELDS = ["source", "destination", "architecture", "tensors", "parameters"]
FIELDS += ["bytes_read", "bytes_written", "seconds", "peak_memory"]
REPORT_US = "this is a bug of transcode: please report it with the output of the same command and --log-level debug"


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(BaseException):
    """A signal arrived; not an Exception, so that nothing but the cleaning up catches it."""

    def __init__(self, code: int) -> None:
        self.code = code


@dataclass(frozen=True)
class Console:
    """How one command talks."""

    command: str
    as_json: bool = False
    quiet: bool = False
    progress: bool = True
    level: str = "info"
    known: Mapping[str, str] = field(default_factory=dict)  # what a failure can tell: source and destination

    def say(self, lines: Iterable[str]) -> None:
        """Lines of the result."""
        if not self.as_json and not self.quiet:
            for line in lines:
                print(clean(line), flush=True)

    def warn(self, lines: Iterable[str]) -> None:
        """Warnings, on stderr."""
        if self.level != "error" and not self.as_json:
            for line in lines:
                print(fitted(f"warning: {line}"), file=sys.stderr)

    @contextmanager
    def bar(self, label: str) -> Iterator[Listener | None]:
        """A progress listener for the time of the block."""
        from transcoder.progress import Bar

        if not self.progress or self.quiet:
            yield None
            return
        bar = Bar(label)
        try:
            yield bar
        finally:
            bar.close()

    def run(self, work: Callable[[], dict[str, Any]], lines: Callable[[dict[str, Any]], Iterable[str]]) -> int:
        """Do the work and tell its result. Returns the exit status."""
        try:
            with _stoppable():
                report = work()
                self.warn(report.get("warnings", ()))
                self.say(lines(report))
                self._emit({"status": "ok", **report})
        except TranscoderError as error:
            return self.fail(error, error.exit_code, error.as_json(), error.report)
        except Stopped as stop:
            notes = getattr(stop, "__notes__", ["nothing was left"])
            return self._other(f"interrupted: {'; '.join(notes)}", "interrupted", stop.code)
        except BrokenPipeError:
            _close_stdout()
            return 0
        except MemoryError:
            return self._other("out of memory: give fewer --workers, or run where more is allowed", "memory", 4)
        except OSError as error:
            _close_stdout()
            return self._other(str(error), "environment", 4)
        except Exception as error:
            return self._other(f"{type(error).__name__}: {error}; {REPORT_US}", "internal", 1)
        return 0

    def _other(self, text: str, kind: str, code: int) -> int:
        return self.fail(text, code, {"code": code, "kind": kind, "message": text, "problems": []}, {})

    def fail(self, message: object, code: int, table: dict[str, Any], report: dict[str, Any]) -> int:
        """Tell an error. Returns `code`."""
        if self.level == "debug":
            traceback.print_exc()
        print(fitted(f"error: {message}"), file=sys.stderr)
        self._emit({"status": "error", **report, "error": table})
        return code

    def _emit(self, table: dict[str, Any]) -> None:
        if self.as_json:
            head = {"status": table["status"], "command": self.command}
            filled = {**head, **dict.fromkeys(FIELDS), "warnings": [], **self.known, **table}
            print(json.dumps(filled), flush=True)


def clean(text: str) -> str:
    """`text` with its line breaks, everything else that writes to a terminal by other means than letters escaped.

    >>> clean("a\\x1b[31m\\u202eb")
    'a\\\\x1b[31m\\\\u202eb'
    """
    return "\n".join(printable(line, 12 * len(line)) if not line.isprintable() else line for line in text.split("\n"))


def fitted(text: str) -> str:
    """`clean` text whose lines have at most 400 characters; longer ones go on in the next line."""
    lines = []
    for line in clean(text).split("\n"):
        lines += [line] if len(line) <= LINE else _wrapped(line)
    return "\n".join(lines)


def _wrapped(line: str) -> list[str]:
    start = line[: len(line) - len(line.lstrip(" "))]
    return textwrap.wrap(line, LINE, initial_indent="", subsequent_indent=f"{start}    ", drop_whitespace=True)


def _close_stdout() -> None:
    """Nobody reads it any more, or it is full: keep the interpreter from flushing it at exit."""
    with suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextmanager
def _stoppable() -> Iterator[None]:
    """The first signal of `SIGNALS` as an exception in this block; a second one ends the process at once."""

    def stop(number: int, frame: object) -> None:
        for other in SIGNALS:
            signal.signal(other, lambda again, _: os._exit(128 + again))
        raise Stopped(128 + number)

    before = {number: signal.signal(number, stop) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
