"""What counts as a finding: anything but a parsed input or one of our refusals, with a message fit for a terminal."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from pathlib import Path

from fuzz import jsons
from fuzz.limits import TooSlow, bounded
from fuzz.targets import Target
from transcoder.errors import TranscoderError

LINE_LIMIT = 2000  # characters of one line of a message
CORPUS = Path(__file__).parent / "corpus"


class BadMessageError(AssertionError):
    """A refusal whose text could drive a terminal, or floods it."""


def outcome(target: Target, data: bytes) -> str:
    """`parsed` or `refused`. Raises whatever else happens, which is a finding."""
    try:
        with bounded():
            target.run(data)
    except TranscoderError as error:
        if error.exit_code == 1:
            raise
        _check_message(error)
        return "refused"
    return "parsed"


def _check_message(error: TranscoderError) -> None:
    json.dumps(error.as_json()).encode()
    for line in str(error).split("\n"):
        if not line.isprintable() or len(line) > LINE_LIMIT:
            raise BadMessageError(f"{type(error).__name__} says {line[:300]!r}")


def judged(target: Target, data: bytes) -> tuple[str, str]:
    """The outcome, and what is wrong in one line: the error and the place in our code where it was raised."""
    try:
        return outcome(target, data), ""
    except (Exception, TooSlow) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = [frame for frame in frames if "/transcoder/" in frame.filename] or frames[-1:]
        place = f"{ours[-1].filename.rpartition('/transcoder/')[2].rpartition('/fuzz/')[2]}:{ours[-1].name}"
        return "finding", f"{type(error).__name__} at {place}: {error!s:.200}".replace("\n", " ")


def finding(target: Target, data: bytes) -> str:
    """What is wrong with how an input is read; empty when nothing is."""
    return judged(target, data)[1]


def signature(text: str) -> str:
    """What findings of one cause share.

    >>> signature("KeyError at a.py:read: 'x'")
    'KeyError at a.py:read'
    """
    return ":".join(text.split(":")[:2])


def shrunk(data: bytes, bad: Callable[[bytes], bool], tries: int = 1500) -> bytes:
    """A smaller input that is still `bad`, by leaving out parts of halving size.

    >>> shrunk(b"abcdefgh", lambda data: b"e" in data)
    b'e'
    """
    size = len(data) // 2
    while size and tries > 0:
        at = 0
        while at < len(data) and tries > 0:
            less, tries = data[:at] + data[at + size :], tries - 1
            data, at = (less, at) if bad(less) else (data, at + size)
        size //= 2
    return data


def smallest(target: Target, data: bytes) -> bytes:
    """The smallest input found that is the same finding."""
    kind = signature(finding(target, data))

    def bad(less: bytes) -> bool:
        return signature(finding(target, target.repair(less))) == kind

    small = target.repair(shrunk(jsons.shrunk(data, bad), bad))
    return small if len(small) < len(data) and signature(finding(target, small)) == kind else data


def corpus(name: str) -> list[Path]:
    """The inputs that are kept for a target."""
    return sorted(path for path in (CORPUS / name).iterdir() if path.is_file())
