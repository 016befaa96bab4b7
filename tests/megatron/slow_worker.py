"""Compares while transformers takes its time, or fails: `torchrun ... slow_worker.py SECONDS MARK OPTIONS...`."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

from torch.distributed.distributed_c10d import _set_pg_timeout

from transcoder.compare import compare
from transcoder.errors import InputError
from transcoder.runtime import comparison

TIMEOUT = timedelta(seconds=3)  # of the groups that everything but the waiting uses


def main(seconds: float, mark: Path, options: list[str]) -> int:
    """Exit status of the comparison; with 0 seconds the reference fails after a while."""
    enter, run_reference = comparison.enter, comparison.run_reference

    def hasty(*given: Any) -> None:
        enter(*given)
        _set_pg_timeout(TIMEOUT)

    def slow(*given: Any) -> Any:
        time.sleep(seconds or 1)
        mark.touch()
        if not seconds:
            raise InputError("the reference fails on purpose")
        return run_reference(*given)

    comparison.enter, comparison.run_reference = hasty, slow
    return int(compare.main(options, standalone_mode=False))


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
