"""Every error of the package, one class per exit status.

    TranscoderError               1  a bug of ours; the message asks for a report
    ├── UsageError   (ValueError)  2  wrong options
    ├── InputError   (ValueError)  3  the input was refused; nothing is visible at the destination
    ├── OutputError  (OSError)     4  destination or environment: disk full, exists, locked
    ├── RemoteError                4  an object store is lost, on either side; 3 where it refuses to give a source
    └── DifferenceError            5  a comparison found a difference

An error carries a stable `kind` for machines and any number of `Problem`s, each naming the tensor or file,
the rule, what was expected, what was found and the next step.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

PathLike = str | os.PathLike[str]
LISTED_PROBLEMS = 20
NAME_LIMIT = 120


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is wrong; empty fields are left out of the message."""

    message: str = ""
    file: str = ""
    tensor: str = ""
    rule: str = ""
    expected: str = ""
    found: str = ""
    hint: str = ""

    def as_json(self) -> dict[str, str]:
        """The fields of the `problems` entries in `--json` output; `message` is left to the error."""
        return {key: value for key, value in asdict(self).items() if key != "message"}

    def __str__(self) -> str:
        subject = ": ".join(printable(part) for part in (self.file, self.tensor) if part)
        details = [printable(self.message, 400)] if self.message else []
        details += [f"{label} {printable(text, 400)}" for label, text in self._labelled() if text]
        text = "; ".join(details)
        line = f"{subject}: {text}" if subject else text
        return f"{line}. {printable(self.hint, 400)}" if self.hint else line

    def _labelled(self) -> Sequence[tuple[str, str]]:
        return ("rule", self.rule), ("expected", self.expected), ("found", self.found)


class TranscoderError(Exception):
    """Base of all errors; raised itself only for conditions that would be a bug of ours."""

    exit_code = 1

    def __init__(self, message: str, *, kind: str = "internal", problems: Iterable[Problem] = ()) -> None:
        super().__init__(message)
        self.kind = kind
        self.report: dict[str, Any] = {}  # what a failed command tells beside the error
        self.problems = tuple(problems)

    def __str__(self) -> str:
        head = str(self.args[0])
        lines = [f"  {problem}" for problem in self.problems[:LISTED_PROBLEMS]]
        if len(self.problems) > LISTED_PROBLEMS:
            lines.append(f"  … and {len(self.problems) - LISTED_PROBLEMS} more")
        return "\n".join([head, *lines])

    def as_json(self) -> dict[str, object]:
        """The `error` object of `--json` output."""
        problems = [problem.as_json() for problem in self.problems]
        return {"code": self.exit_code, "kind": self.kind, "message": str(self), "problems": problems}


class UsageError(TranscoderError, ValueError):
    """The options do not fit together or do not fit the model."""

    exit_code = 2


class InputError(TranscoderError, ValueError):
    """The source is damaged, incomplete, hostile or not supported."""

    exit_code = 3


class OutputError(TranscoderError, OSError):
    """The destination or the machine does not allow the work."""

    exit_code = 4


class RemoteError(TranscoderError):
    """An object store does not answer or refuses. Not an OSError: no reader of a file takes it for a fault of that.

    A run that meets it can go on with --resume.
    """

    def __init__(self, message: str, *, source: bool = False, kind: str, problems: Iterable[Problem]) -> None:
        super().__init__(message, kind=kind, problems=problems)
        self.exit_code = 3 if source else 4


class DifferenceError(TranscoderError):
    """Two things that should be equal are not."""

    exit_code = 5


def printable(text: str, limit: int = NAME_LIMIT) -> str:
    """`text` on one line, control characters escaped, cut after `limit` characters.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    safe = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
    return safe if len(safe) <= limit else f"{safe[:limit]}… ({len(text.encode(errors='replace'))} bytes)"


def reason(error: BaseException) -> str:
    """What an exception of the system or of a parser says, without the path that the message names anyway."""
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


def refuse(kind: str, message: str, problems: Iterable[Problem] = ()) -> InputError:
    """An `InputError`, for the most common refusals."""
    return InputError(message, kind=kind, problems=problems)
