"""Commands to which something happens in the middle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from command_line import Result, succeed, transcode
from fault_model import write_llama

STOP = 7  # bands after which something happens
AT_A_BAND = """
import os, resource, shutil
import transcoder.engine as engine
from transcoder.progress import Tally
engine.BAND = 1024
moved, seen = Tally.moved, []
def happens(self, size):
    seen.append(size)
    if len(seen) == {stop}:
        {event}
    moved(self, size)
Tally.moved = happens
"""
SMALL = "import transcoder.engine as engine\nengine.BAND = 1024\n"
Line = list[Any]


def undisturbed(place: Path) -> dict[str, Path]:
    """A model of a few hundred bands of 1 KiB, and what each command makes of it."""
    source = write_llama(place / "hf", layers=8, hidden=64, shards=2)
    found = {"source": source, "hf2mcore": place / "mcore", "mcore2hf": place / "back"}
    succeed("hf2mcore", source, found["hf2mcore"], "--tp", 2, "--pp", 2, driver=SMALL)
    succeed("mcore2hf", found["hf2mcore"], found["mcore2hf"], driver=SMALL)
    return found


def payload(line: Line) -> Path:
    """A file of the source from which the last bands are read."""
    return max(line[1].rglob("*.safetensors" if line[0] == "hf2mcore" else "*.distcp"), key=lambda path: path.name)


def meanwhile(line: Line, event: str, stop: int = STOP) -> Result:
    """Run it; after `stop` bands the event, a line of Python, happens."""
    return transcode(*line, driver=AT_A_BAND.format(stop=stop, event=event))


def refused(done: Result, code: int, *words: str) -> None:
    """One message on stderr, with these words in it."""
    assert done.code == code, done.err
    assert done.err.count("error: ") == 1
    assert "Traceback" not in done.err
    assert [word for word in words if word not in done.err] == [], done.err
