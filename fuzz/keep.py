"""Adds to the corpus what a run learned: `python -m fuzz.keep FOLDER`, one small input for each answer of a reader.

An answer is a refusal's kind and the words of its message, without names and numbers.
"""

from __future__ import annotations

import hashlib
import re
import sys
from collections.abc import Iterable
from itertools import accumulate
from pathlib import Path

from fuzz import judge
from fuzz.targets import TARGETS, Target
from transcoder.errors import TranscoderError

SIZE, TOTAL = 4 << 10, 12 << 10  # bytes of an input, and of all that are added to a target


def answer(target: Target, data: bytes) -> str:
    """What a reader says about an input, in general terms."""
    try:
        target.run(data)
    except TranscoderError as error:
        details = [f"{problem.message} {problem.expected}" for problem in error.problems[:1]]
        return error.kind + general(" ".join([str(error.args[0]), *details]))
    return ""


def general(text: str) -> str:
    """The first words of a message, names and numbers left out.

    >>> general("'a\\\\x1b' starts at byte 12, expected 10: a hole")
    ' starts at byte expected a hole'
    """
    words = re.sub(r"'[^']*'|[^a-z ]", "", text.lower()).split()
    return " " + " ".join(words[:10])


def chosen(target: Target, inputs: Iterable[bytes], known: set[str]) -> list[bytes]:
    """The smallest input of each answer that is not known; findings are left out."""
    found: dict[str, bytes] = {}
    for data in sorted(inputs, key=lambda data: (len(data), data)):
        if len(data) <= SIZE and not judge.finding(target, data):
            found.setdefault(answer(target, data), data)
    new = [data for text, data in found.items() if text not in known]
    return [data for data, size in zip(new, accumulate(map(len, new)), strict=True) if size <= TOTAL]


def main(folder: str) -> None:
    """Choose for every target."""
    for name, target in TARGETS.items():
        kept = [path.read_bytes() for path in judge.corpus(name)]
        known = {answer(target, data) for data in kept if not judge.finding(target, data)}
        learned = [path.read_bytes() for path in sorted((Path(folder) / "learned" / name).glob("*"))]
        for data in chosen(target, learned, known):
            (judge.CORPUS / name / f"reach-{hashlib.sha256(data).hexdigest()[:8]}").write_bytes(data)


if __name__ == "__main__":
    main(sys.argv[1])
