"""What the numbers were taken on, and whether there is room to take them."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def cpu_model() -> str:
    """As the kernel names it."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith(("model name", "CPU part")):
            return line.split(":", 1)[1].strip()
    return platform.machine()


def commit() -> str:
    """Of the source tree, with a mark when it was changed; "unknown" outside a clone."""
    found = subprocess.run(
        ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def describe(folder: Path) -> dict[str, Any]:
    """Processor, cores that may be used, memory, kernel, file system, versions; never a host's name."""
    pages, page = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
    kind = subprocess.run(["stat", "-f", "-c", "%T", str(folder)], capture_output=True, text=True, check=False)
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"), "commit": commit(), "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)), "memory_GiB": round(pages * page / 2**30, 1),
        "kernel": platform.release(), "file_system": kind.stdout.strip(), "python": platform.python_version(),
    }  # fmt: skip


def demand_room(folder: Path, needed: int) -> None:
    """Ends the run when the disk of a folder has too little room."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SystemExit(
            f"{folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free. Free some, name another folder with "
            "--folder, take fewer groups with --only, or small sources with --quick"
        )
