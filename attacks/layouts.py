"""What the folder seems to be, and trackers: numbers that are none, backends that nobody knows."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import json
import shutil
from typing import Any

from attacks.bench import Bench
from attacks.case import attack

WORDS = "mcore2hf check"
TRACKER = "latest_checkpointed_iteration.txt"
TRACKERS: dict[str, bytes] = {
    "empty": b"", "word": b"latest", "negative": b"-1", "float": b"1.0", "hexadecimal": b"0x0", "underscore": b"0_0", "path": b"../outside",
    "absolute": b"/etc", "other_iteration": b"7", "arabic_digits": "\u0660".encode(), "superscript": "\u00b2".encode(),
    "nul": b"0\0", "two_lines": b"0\n1\n", "long": b"0" * 5000, "huge_number": b"9" * 60, "spaces_inside": b"0 0", "plus": b"+0",
    "release_missing": b"release", "release_upper": b"RELEASE", "binary": bytes(range(128, 160)), "code": b"__import__('os')",
}  # fmt: skip


def _enter() -> None:
    for word, data in TRACKERS.items():

        def build(bench: Bench, data: bytes = data) -> None:
            (bench.source / TRACKER).write_bytes(data)

        build.__name__, build.__doc__ = f"tracker_{word}", f"The tracker: {word.replace('_', ' ')}."
        attack("reject", "mcore", WORDS, "latest_checkpointed_iteration|iteration|release")(build)


_enter()


def reject(needle: str = "", base: str = "mcore", commands: str = WORDS) -> Any:
    """A layout that must be refused."""
    return attack("reject", base, commands, needle)


@reject()
def tracker_of_a_terabyte(bench: Bench) -> None:
    """A sparse tracker: 64 bytes are enough to know."""
    with (bench.source / TRACKER).open("r+b") as file:
        file.truncate(10**12)


@attack("ok", "mcore", WORDS)
def tracker_with_newline(bench: Bench) -> None:
    """A newline behind the number, as an editor leaves it."""
    (bench.source / TRACKER).write_text("0\n")


@attack("warn", "mcore", WORDS, "tracker|latest_checkpointed|iteration")
def tracker_missing(bench: Bench) -> None:
    """No tracker and exactly one iteration."""
    (bench.source / TRACKER).unlink()


@reject("iter")
def tracker_missing_and_two_iterations(bench: Bench) -> None:
    """No tracker and two iterations: which one is meant?"""
    (bench.source / TRACKER).unlink()
    shutil.copytree(bench.folder, bench.source / "iter_0000005")


BACKENDS: dict[str, Any] = {
    "unknown": {"sharded_backend": "evil"}, "number": {"sharded_backend": 1}, "list": ["torch_dist"], "empty": {}, "path": {"sharded_backend": "../x"},
    "module": {"sharded_backend": "os.system"}, "version": {"sharded_backend": "torch_dist", "sharded_backend_version": 99},
    "version_text": {"sharded_backend": "torch_dist", "sharded_backend_version": "1"},
    "common_unknown": {"sharded_backend": "torch_dist", "common_backend": "pickle"},
}  # fmt: skip


def _enter_backends() -> None:
    for word, rows in BACKENDS.items():

        def build(bench: Bench, rows: Any = rows) -> None:
            (bench.folder / "metadata.json").write_text(json.dumps(rows))

        build.__name__, build.__doc__ = f"backend_{word}", f"`metadata.json` with a backend: {word}."
        attack("reject", "mcore", WORDS, r"metadata\.json|backend")(build)


_enter_backends()


@reject("metadata.json")
def backend_not_json(bench: Bench) -> None:
    """`metadata.json` cut short."""
    (bench.folder / "metadata.json").write_text('{"sharded_backend": ')


@reject("metadata.json")
def backend_deep(bench: Bench) -> None:
    """`metadata.json` of brackets."""
    (bench.folder / "metadata.json").write_text("[" * 100_000)


@reject("metadata.json")
def backend_twice(bench: Bench) -> None:
    """Two backends in one file."""
    (bench.folder / "metadata.json").write_text('{"sharded_backend": "zarr", "sharded_backend": "torch_dist"}')


@attack("warn", "mcore", WORDS, r"metadata\.json")
def backend_missing(bench: Bench) -> None:
    """No `metadata.json`: Megatron would refuse, the weights are there."""
    (bench.folder / "metadata.json").unlink()


@reject("hugging|megatron|mcore2hf", "mcore", "hf2mcore")
def megatron_given_as_hugging_face(bench: Bench) -> None:
    """A Megatron checkpoint where a model is wanted: say what it is."""


@reject("hugging|hf2mcore", "hf", "mcore2hf")
def hugging_face_given_as_megatron(bench: Bench) -> None:
    """A model where a checkpoint is wanted: say what it is."""


@reject("legacy|mp_rank|pickle")
def legacy_folder(bench: Bench) -> None:
    """The format before distributed checkpoints: pickles, refused and never opened."""
    shutil.rmtree(bench.folder)
    folder = bench.folder / "mp_rank_00"
    folder.mkdir(parents=True)
    (folder / "model_optim_rng.pt").write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


@reject()
def empty_folder(bench: Bench) -> None:
    """A folder of nothing."""
    shutil.rmtree(bench.source)
    bench.source.mkdir()


@reject()
def a_file(bench: Bench) -> None:
    """A file where a folder is wanted."""
    shutil.rmtree(bench.source)
    bench.source.write_bytes(b"x")


@reject(".metadata|incomplete|unfinished")
def no_plan(bench: Bench) -> None:
    """A save that crashed before its plan was written."""
    (bench.folder / ".metadata").unlink()


@reject("", "mcore", "mcore2hf check inspect verify")
def unfinished_conversion(bench: Bench) -> None:
    """A work folder of an interrupted run is no checkpoint."""
    (bench.folder / ".metadata").unlink()
    (bench.folder / "metadata.json").unlink()
    (bench.folder / "journal").write_text("{}")


@attack("ok", "mcore", WORDS)
def foreign_files(bench: Bench) -> None:
    """Files of other tools beside the iteration, a folder of an odd name among them."""
    (bench.source / "notes.txt").write_text("x")
    (bench.source / "iter_final").mkdir()
    (bench.source / "wandb").mkdir()
