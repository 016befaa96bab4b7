"""Read the step from Megatron Bridge's train_state.pt without torch."""

from __future__ import annotations

from transcoder.errors import Problem, refuse
from transcoder.formats.archive import read_archive, read_pickle
from transcoder.formats.pickles import Pairs, Persistent, Record
from transcoder.spec import BY_STORAGE


def step_of(view: memoryview) -> int:
    """The number under `step`, a 0-d integer tensor. Raises InputError when there is none."""
    subject = "train_state.pt"
    root = read_pickle(view, None, subject)
    value = root.as_dict().get("step") if isinstance(root, Pairs) else None
    if isinstance(value, Record) and value.args and isinstance(value.args[0], Persistent):
        storage = value.args[0].value
        if isinstance(storage, tuple) and len(storage) == 5:
            dtype = BY_STORAGE.get(getattr(storage[1], "name", ""))
            entry = read_archive(view, subject).get(f"data/{storage[2]}")
            if dtype is not None and entry is not None:
                return int.from_bytes(view[entry.start : entry.start + dtype.size], "little", signed=True)
    raise refuse("train-state", "no step in the train state", [Problem(file=subject)])
