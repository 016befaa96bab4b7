"""Which iteration the user means: the directory itself, or the one that a checkpoint directory's trackers name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoder.errors import InputError, Problem, refuse
from transcoder.formats.torch_dist import map_file
from transcoder.formats.trainstate import step_of

TEXT_TRACKER, STATE_TRACKER = TRACKERS = ("latest_checkpointed_iteration.txt", "latest_train_state.pt")


def find_iteration(path: Path) -> Path:
    """The iteration directory for what the user named. Raises InputError listing what exists."""
    if not path.is_dir():
        raise refuse("not-found", f"{path}: no such directory; give a Megatron checkpoint")
    if (path / ".metadata").is_file():
        return path
    if (path / "metadata.json").is_file():
        message = f"{path} has metadata.json but no .metadata: it is not a complete torch_dist checkpoint"
        raise refuse("unfinished", message)
    if (path / "dist_ckpt" / ".metadata").is_file():
        return path / "dist_ckpt"
    existing = sorted(entry.name for entry in path.iterdir() if (entry / ".metadata").is_file())
    if (path / TEXT_TRACKER).is_file():
        return _tracked(path, existing)
    own = [name for name in existing if not (path / name).is_symlink()]
    if len(own) == 1:
        return path / own[0]
    problem = Problem(expected="one iteration with .metadata", found=", ".join(existing) or "none")
    raise refuse("no-checkpoint", f"{path} is not a Megatron checkpoint", [problem])


def _tracked(path: Path, existing: list[str]) -> Path:
    name = _text_names(path / TEXT_TRACKER)
    if name not in existing:
        problem = Problem(file=TEXT_TRACKER, expected=f"one of {existing}", found=name)
        raise refuse("tracker", f"the tracker names {name}, which is not there", [problem])
    if (path / STATE_TRACKER).is_file():
        other = _state_names(path / STATE_TRACKER)
        if (path / name).resolve().name not in (other, "release"):
            found = f"{TEXT_TRACKER} names {name}, {STATE_TRACKER} names {other}"
            hint = "give the directory of the iteration"
            raise refuse("trackers", "two trackers name different iterations", [Problem(found=found, hint=hint)])
    return _followed(path / name)


def _followed(folder: Path) -> Path:
    """A link to a sibling, which is what `release` is, as that sibling. Raises InputError for any other link."""
    if not folder.is_symlink():
        return folder
    real = folder.resolve()
    if real.parent != folder.parent.resolve():
        raise refuse("tracker", f"{folder} leads out of the checkpoint", [Problem(found=str(real))])
    return folder.parent / real.name


def _text_names(tracker: Path) -> str:
    with tracker.open("rb") as file:
        text = file.read(64).strip()
    if text != b"release" and not text.isdigit():
        problem = Problem(file=tracker.name, expected="a number or release", found=repr(text))
        raise refuse("tracker", "the tracker is not a number", [problem])
    return "release" if text == b"release" else f"iter_{int(text):07d}"


def _state_names(tracker: Path) -> str:
    return f"iter_{step_of(map_file(tracker)):07d}"


def names_iteration(tracker: Path, folder: Path) -> bool:
    """Whether a tracker file names `folder`; one that cannot be read may have named it."""
    try:
        name = _state_names(tracker) if tracker.name == STATE_TRACKER else _text_names(tracker)
    except InputError:
        return True
    return (tracker.parent / name).resolve() == folder.resolve()


def current_rows(folder: Path, table: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """The files that a manifest lists; its trackers count only while those present name the manifest's iteration.

    With none present the iteration was copied by itself.
    """
    if table is None:
        return []
    trackers = [folder / row["name"] for row in table["files"] if row["name"].startswith("../")]
    present = [tracker for tracker in trackers if tracker.is_file()]
    at_home = folder.name == table["folder"] and present and all(names_iteration(path, folder) for path in present)
    return [row for row in table["files"] if at_home or not row["name"].startswith("../")]
