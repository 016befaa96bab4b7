"""Which iteration the user means: the directory itself, or the one that a checkpoint directory's trackers name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transcoder.disk import there
from transcoder.errors import InputError, Problem, reason, refuse
from transcoder.formats.opening import is_checkpoint
from transcoder.formats.trainstate import step_of
from transcoder.paths import map_file, open_regular

TRACKER_LIMIT = 64  # bytes
TEXT_TRACKER, STATE_TRACKER = TRACKERS = ("latest_checkpointed_iteration.txt", "latest_train_state.pt")


def find_iteration(path: Path) -> Path:
    """The iteration directory for what the user named. Raises InputError listing what exists."""
    if not path.is_dir():
        raise refuse("not-found", f"{path}: no such directory; give a Megatron checkpoint")
    if is_checkpoint(path):
        return path
    if (path / "metadata.json").is_file():
        message = f"{path} has metadata.json but no .metadata: it is not a complete torch_dist checkpoint"
        raise refuse("unfinished", message)
    if is_checkpoint(path / "dist_ckpt"):
        return path / "dist_ckpt"
    existing = sorted(entry.name for entry in path.iterdir() if is_checkpoint(entry))
    if there(path / TEXT_TRACKER):
        return _tracked(path, existing)
    own = [name for name in existing if not (path / name).is_symlink()]
    if len(own) == 1:
        return path / own[0]
    problem = Problem(expected="one iteration with .metadata", found=", ".join(existing) or "none")
    raise refuse("no-checkpoint", f"{path} is not a Megatron checkpoint", [problem])


def _tracked(path: Path, existing: list[str]) -> Path:
    name = _text_names(path / TEXT_TRACKER)
    if name not in existing:
        hint = _why_unreadable(path / name)
        problem = Problem(file=TEXT_TRACKER, expected=f"one of {existing}", found=name, hint=hint)
        raise refuse("tracker", f"the tracker names {name}, which is not there", [problem])
    if there(path / STATE_TRACKER):
        other = _state_names(path / STATE_TRACKER)
        if (path / name).resolve().name not in (other, "release"):
            found = f"{TEXT_TRACKER} names {name}, {STATE_TRACKER} names {other}"
            hint = "give the directory of the iteration"
            raise refuse("trackers", "two trackers name different iterations", [Problem(found=found, hint=hint)])
    return _followed(path / name)


def _why_unreadable(folder: Path) -> str:
    """What is wrong with an iteration's folder that holds no plan."""
    if not folder.is_dir():
        return ""
    return f"{folder.name} holds no .metadata: it is not a complete torch_dist checkpoint"


def notes(path: Path) -> list[str]:
    """What had to be guessed about a directory that `find_iteration` accepts."""
    given = is_checkpoint(path) or is_checkpoint(path / "dist_ckpt")
    if given or there(path / TEXT_TRACKER):
        return []
    return [f"there is no {TEXT_TRACKER}: the only iteration is taken"]


def _followed(folder: Path) -> Path:
    """A link to a sibling, which is what `release` is, as that sibling. Raises InputError for any other link."""
    if not folder.is_symlink():
        return folder
    real = folder.resolve()
    if real.parent != folder.parent.resolve():
        raise refuse("tracker", f"{folder} leads out of the checkpoint", [Problem(found=str(real))])
    return folder.parent / real.name


def _text_names(tracker: Path) -> str:
    try:
        with open_regular(tracker) as file:
            text = bytes(file.read(TRACKER_LIMIT + 1))
    except (OSError, ValueError) as error:
        raise refuse(
            "tracker", "the tracker cannot be read", [Problem(file=tracker.name, message=reason(error))]
        ) from error
    if len(text) > TRACKER_LIMIT or (text.strip() != b"release" and not text.strip().isdigit()):
        problem = Problem(file=tracker.name, expected="a number or release", found=f"{text!r:.80}")
        raise refuse("tracker", "the tracker is not a number", [problem])
    return "release" if text.strip() == b"release" else f"iter_{int(text):07d}"


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
