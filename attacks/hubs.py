"""Hub caches: links that are ordinary user input, and caches that lead elsewhere."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.paths import link, reject

REPOSITORY = "models--org--tiny"
HUB = "{place}/hub/models--org--tiny/snapshots/0123abcd"
HUB_COMMANDS = (f"hf2mcore {HUB} {{dst}} --no-sync", f"inspect {HUB}")
MARKER = ".huggingface-shared-blobs"


def hub(bench: Bench) -> tuple[Path, Path]:
    """The attacked model as a hub cache keeps it: folders of blobs and of the snapshot."""
    root = bench.place / "hub" / REPOSITORY
    blobs, snapshot = root / "blobs", root / "snapshots" / "0123abcd"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(bench.source.iterdir())):
        etag = f"{number:040x}"
        path.rename(blobs / etag)
        (snapshot / path.name).symlink_to(f"../../blobs/{etag}")
    return blobs, snapshot


def share(bench: Bench, blob: Path, digest: str = "ab" * 32, marker: bool = True) -> Path:
    """Move a blob to the store of all repositories."""
    store = bench.place / "hub" / "blobs"
    place = store / digest[:2] / digest
    place.parent.mkdir(parents=True, exist_ok=True)
    blob.rename(place)
    blob.symlink_to(f"../../blobs/{digest[:2]}/{digest}")
    if marker:
        (store / MARKER).write_text("1")
    return place


@attack("ok", "hf", "", "", *HUB_COMMANDS)
def hub_cache(bench: Bench) -> None:
    """`snapshots/REV/x` → `../../blobs/ETAG`: ordinary user input."""
    hub(bench)


@attack("ok", "hf", "", "", *HUB_COMMANDS)
def hub_cache_with_shared_blobs(bench: Bench) -> None:
    """huggingface_hub 2: from there to the store of all repositories."""
    blobs, _ = hub(bench)
    for number, blob in enumerate(sorted(blobs.iterdir())):
        share(bench, blob, f"{number:02x}" * 32)


@attack("ok", "hf", "", "", *HUB_COMMANDS)
def hub_cache_of_a_folder_in_the_snapshot(bench: Bench) -> None:
    """A file in a folder of the snapshot has one more step up."""
    blobs, snapshot = hub(bench)
    (snapshot / "extra").mkdir()
    (blobs / "fe").write_text("notes\n")
    (snapshot / "extra" / "notes.txt").symlink_to("../../../blobs/fe")


def hub_reject(needle: str = "") -> Any:
    """A hub cache that leads elsewhere."""
    return attack("reject", "hf", "", needle, *HUB_COMMANDS)


def weight_blob(snapshot: Path) -> Path:
    """The blob of the second shard."""
    return Path(os.path.realpath(snapshot / "model-00002-of-00002.safetensors"))


@hub_reject()
def hub_blob_links_outside(bench: Bench) -> None:
    """A blob that is a link to a file of somebody else."""
    _, snapshot = hub(bench)
    link(weight_blob(snapshot), bench.stranger / bench.second.name)


@hub_reject()
def hub_blob_of_another_repository(bench: Bench) -> None:
    """A snapshot that takes its file from another, perhaps private, repository."""
    _, snapshot = hub(bench)
    other = bench.place / "hub" / "models--other--private" / "blobs"
    other.mkdir(parents=True)
    weight_blob(snapshot).rename(other / "aa")
    link(snapshot / bench.second.name, "../../../models--other--private/blobs/aa")


@hub_reject()
def hub_store_without_marker(bench: Bench) -> None:
    """A folder `blobs` that does not say that it is the store."""
    _, snapshot = hub(bench)
    share(bench, weight_blob(snapshot), marker=False)


@hub_reject()
def hub_store_entry_is_a_link(bench: Bench) -> None:
    """Two hops are allowed, not three."""
    _, snapshot = hub(bench)
    place = share(bench, weight_blob(snapshot))
    link(place, bench.stranger / bench.second.name)


@hub_reject()
def hub_store_entry_of_another_prefix(bench: Bench) -> None:
    """An entry that does not lie under the first two digits of its name."""
    _, snapshot = hub(bench)
    blob = weight_blob(snapshot)
    place = share(bench, blob)
    place.rename(place.with_name("cd" * 32))
    link(blob, f"../../blobs/ab/{'cd' * 32}")


@hub_reject()
def hub_store_of_any_name(bench: Bench) -> None:
    """An entry of the store whose name is no digest."""
    _, snapshot = hub(bench)
    blob = weight_blob(snapshot)
    place = share(bench, blob)
    place.rename(place.with_name("notes.txt"))
    link(blob, "../../blobs/ab/notes.txt")


@hub_reject()
def hub_config_links_outside(bench: Bench) -> None:
    """The configuration's blob is a link outside."""
    _, snapshot = hub(bench)
    link(Path(os.path.realpath(snapshot / "config.json")), bench.stranger / "config.json")


def folder_that_looks_like_a_hub(bench: Bench) -> None:
    """A copy of a repository with `blobs` two levels up from a folder that is no snapshot."""
    blobs = bench.place / "blobs"
    blobs.mkdir()
    bench.second.rename(blobs / "aa")
    link(bench.second, "../blobs/aa")


reject()(folder_that_looks_like_a_hub)
