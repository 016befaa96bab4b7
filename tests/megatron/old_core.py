"""The environment of megatron-core 0.15.3, the last one that saves and loads zarr: an interpreter of its own.

It wants numpy < 2 and zarr < 3. `make .venv-mcore015/done` makes it; MCORE015_PYTHON names another one.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TARGET = ".venv-mcore015/done"
PROBE = "from importlib.metadata import version; print(version('megatron-core'), version('zarr'))"


@cache
def interpreter() -> Path:
    """Its Python; made on a machine that has none."""
    given = os.environ.get("MCORE015_PYTHON")
    if given is None:
        subprocess.run(["make", TARGET], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    python = Path(given) if given else ROOT / TARGET.split("/")[0] / "bin" / "python"
    found = subprocess.run([python, "-c", PROBE], check=True, capture_output=True, text=True).stdout.split()
    assert found[0] == "0.15.3" and found[1].startswith("2."), found
    return python
