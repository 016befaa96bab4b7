"""How `generate` and `compare` talk: lines for people or one JSON object, from one process of the job."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from transcoder.console import Console
from transcoder.errors import DifferenceError, TranscoderError


class Voice(Console):
    """The console of a command that many processes run; that which speaks calls `tell` or `differ` once."""

    @property
    def speaks(self) -> bool:
        """Whether lines of the result are printed."""
        return not (self.as_json or self.quiet)

    def tell(self, report: Mapping[str, Any]) -> None:
        """The end of a run that went well."""
        self._emit({"status": "ok", **report})

    def differ(self, message: str, report: Mapping[str, Any]) -> None:
        """The end of a comparison that found a difference."""
        error = DifferenceError(message, kind="difference")
        print(f"error: {error}", file=sys.stderr, flush=True)
        self._emit({"status": "error", **report, "error": error.as_json()})

    def refuse(self, error: BaseException, message: str, code: int) -> None:
        """The end of a run that failed; called while the error is handled."""
        table: dict[str, Any] = {"code": code, "kind": _kind(error, code), "message": message, "problems": []}
        if isinstance(error, TranscoderError):
            table = error.as_json()
        self.fail(message, code, table, {})


def _kind(error: BaseException, code: int) -> str:
    if isinstance(error, KeyboardInterrupt):
        return "interrupted"
    return "environment" if code == 4 else "internal"


def voice_of(command: str, chosen: dict[str, Any]) -> Voice:
    """Take the options of every command out of those that were given."""
    as_json, quiet, hidden = (chosen.pop(name) for name in ("as_json", "quiet", "no_progress"))
    source = chosen["megatron_model_path"] or chosen["hf_model_path"]
    known = {"source": str(source)} if source is not None else {}
    return Voice(command, as_json, quiet, not hidden, chosen.pop("log_level"), known)
