"""A source that changes while it is converted is refused by name; nothing of it is to be seen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from meanwhile import meanwhile, payload, refused

EVENTS = {
    "touched": "os.utime({path!r}, ns=(1, 1))",
    "replaced": "shutil.copy2({path!r}, {path!r} + '.copy'); os.replace({path!r} + '.copy', {path!r})",
    "longer": "open({path!r}, 'ab').write(b'more')",
    "emptied": "os.truncate({path!r}, 0)",
    "cut": "os.truncate({path!r}, 5000)",
    "gone": "os.unlink({path!r})",
    "written over": "os.pwrite(os.open({path!r}, os.O_RDWR), b'other', os.stat({path!r}).st_size // 2)",
}


@pytest.mark.parametrize("event", EVENTS)
def test_a_source_that_changes_meanwhile_is_three_and_named(tmp_path: Path, line: list[Any], event: str) -> None:
    path = payload(line)
    done = meanwhile([*line, "--workers", 1], EVENTS[event].format(path=str(path)))
    refused(done, 3, path.name)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("event", ["touched", "replaced", "longer", "cut"])
def test_what_changed_is_said(line: list[Any], event: str) -> None:
    done = meanwhile([*line, "--workers", 1], EVENTS[event].format(path=str(payload(line))))
    refused(done, 3, *{"touched": ["modified"], "replaced": ["inode"]}.get(event, ["bytes"]))


def test_a_side_file_that_changes_meanwhile_is_three(tmp_path: Path, line: list[Any]) -> None:
    path = next(iter(sorted(line[1].rglob("tokenizer.json"))))
    done = meanwhile(line, f"open({str(path)!r}, 'a').write(' ')")
    refused(done, 3, "tokenizer.json")
    assert not (tmp_path / "new").exists()
