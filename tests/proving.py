"""The record behind `transcode architectures`: what passing tests prove, and whether the package says the same.

A test names what it proves with the fixture `proves`. `pytest --proved=check` fails when the record differs from what
the tests of this run proved; `--proved=write` makes the record anew.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import transcoder
from transcoder.reading import CLAIMS
from transcoder.recipes import registry

RECORD = Path(transcoder.__file__).parent / "proved.json"


class Proving:
    """Collects claims from the reports of tests, in the process that sees all of them."""

    def __init__(self, mode: str) -> None:
        self.mode, self.complaint = mode, ""
        self.passed, self.failed = set[tuple[str, str]](), set[tuple[str, str]]()

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Take the claims of one test."""
        claims = {tuple(value) for key, value in report.user_properties if key == "proves"}
        if report.failed:
            self.failed |= claims
        elif report.when == "call":
            self.passed |= claims

    def pytest_sessionfinish(self, session: Any) -> None:
        """Write the record or compare it."""
        proved = table(self.passed - self.failed)
        if self.mode == "write":
            RECORD.write_text(json.dumps(proved, indent=2) + "\n")
        elif (recorded := json.loads(RECORD.read_text())) != proved:
            rows = [name for name in proved if recorded.get(name) != proved[name]]
            rows += [name for name in recorded if name not in proved]
            self.complaint = f"{RECORD.name} is not what the tests prove for {', '.join(rows)}: run `make record`"
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        """Say why the run failed."""
        if self.complaint:
            terminalreporter.write_line(self.complaint, red=True)


def table(claims: set[tuple[str, str]]) -> dict[str, dict[str, bool]]:
    """Per architecture, which claims are proved."""
    return {name: {claim: (claim, name) in claims for claim in CLAIMS} for name in sorted(registry())}
