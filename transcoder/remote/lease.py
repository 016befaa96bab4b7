"""One run at a time in a destination: an object that is made only where there is none."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from transcoder.errors import OutputError, Problem, TranscoderError
from transcoder.journal import boot_id
from transcoder.remote.errors import explained
from transcoder.remote.paths import RemotePath
from transcoder.remote.store import Failed, tried


@contextmanager
def leased(folder: RemotePath) -> Iterator[None]:
    """Nobody else works in `folder` during the block. Raises OutputError naming who does."""
    lock, store = folder / "lock", folder.bucket.store
    text = json.dumps({"process": os.getpid(), "host": os.uname().nodename, "boot": boot_id(), "time": time.time()})
    try:
        tried(lambda: store.put(lock.key, text.encode(), fresh=True))
    except Failed as failure:
        if failure.kind != "exists":
            raise explained(failure, str(lock), True) from failure
        _take_over(lock, text)
    try:
        yield
    finally:
        with suppress(TranscoderError):
            folder.bucket.asked(lambda: store.delete(lock.key), lock.key)


def _take_over(lock: RemotePath, text: str) -> None:
    """Replace the lease of a run that is no more. Raises OutputError when it may live."""
    store = lock.bucket.store
    entry = lock.bucket.asked(lambda: store.head(lock.key), lock.key)
    holder: dict[str, Any] = {}
    with suppress(ValueError):
        if entry is not None:
            data = lock.bucket.asked(lambda: store.read(lock.key, 0, min(entry.size, 1000), entry.etag), lock.key)
            holder = dict(json.loads(data))
    if not _dead(holder):
        age = time.time() - float(holder.get("time", time.time()))
        found = f"process {holder.get('process')} on {holder.get('host')}, started {age:.0f} seconds ago"
        hint = f"wait for it to end; if it runs no more, delete {lock}"
        problem = Problem(file=str(lock.parent), found=found, hint=hint)
        raise OutputError("the destination is being written by another run", kind="locked", problems=[problem])
    lock.bucket.asked(lambda: store.delete(lock.key), lock.key)
    try:
        tried(lambda: store.put(lock.key, text.encode(), fresh=True))
    except Failed as failure:
        raise explained(failure, str(lock), True) from failure


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the process was on this machine and is no more."""
    if holder.get("boot") != boot_id() or not boot_id() or holder.get("host") != os.uname().nodename:
        return False
    try:
        os.kill(int(holder["process"]), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, KeyError, ValueError, TypeError):
        return False
    return False
