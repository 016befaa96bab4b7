"""Results on stdout, messages on stderr, one JSON object for machines, and the exit status for both."""

from __future__ import annotations

import json
import signal
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from transcoder.errors import TranscoderError

if TYPE_CHECKING:
    from transcoder.progress import Listener

LEVELS = ("debug", "info", "warning", "error")
FIELDS = ["source", "destination", "architecture", "tensors", "parameters"]
FIELDS += ["bytes_read", "bytes_written", "seconds", "peak_memory"]
REPORT_US = "this is a bug of transcode: please report it with the output of the same command and --log-level debug"


class Terminated(BaseException):
    """SIGTERM arrived; not an Exception, so that nothing but the cleaning up catches it."""


@dataclass(frozen=True)
class Console:
    """How one command talks."""

    command: str
    as_json: bool = False
    quiet: bool = False
    progress: bool = True
    level: str = "info"

    def say(self, lines: Iterable[str]) -> None:
        """Lines of the result."""
        if not self.as_json and not self.quiet:
            for line in lines:
                print(line, flush=True)

    def warn(self, lines: Iterable[str]) -> None:
        """Warnings, on stderr."""
        if self.level != "error" and not self.as_json:
            for line in lines:
                print(f"warning: {line}", file=sys.stderr)

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
            with _terminable():
                report = work()
                self.warn(report.get("warnings", ()))
                self.say(lines(report))
        except TranscoderError as error:
            return self.fail(error, error.exit_code, error.as_json(), error.report)
        except KeyboardInterrupt as error:
            return self._interrupted(error, 130)
        except Terminated as error:
            return self._interrupted(error, 143)
        except Exception as error:
            text = f"{type(error).__name__}: {error}; {REPORT_US}"
            return self.fail(text, 1, {"code": 1, "kind": "internal", "message": text, "problems": []}, {})
        self._emit({"status": "ok", **report})
        return 0

    def _interrupted(self, error: BaseException, code: int) -> int:
        text = "interrupted; nothing is left at the destination"
        return self.fail(text, code, {"code": code, "kind": "interrupted", "message": text, "problems": []}, {})

    def fail(self, message: object, code: int, table: dict[str, Any], report: dict[str, Any]) -> int:
        """Tell an error. Returns `code`."""
        if self.level == "debug":
            traceback.print_exc()
        print(f"error: {message}", file=sys.stderr)
        self._emit({"status": "error", **report, "error": table})
        return code

    def _emit(self, table: dict[str, Any]) -> None:
        if self.as_json:
            head = {"status": table["status"], "command": self.command}
            filled = {**head, **dict.fromkeys(FIELDS), "warnings": [], **table}
            print(json.dumps(filled, ensure_ascii=False), flush=True)


@contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM as an exception in this block, so that a failed run cleans up."""

    def stop(number: int, frame: object) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
