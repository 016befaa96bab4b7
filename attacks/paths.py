"""Links that leave the input, hub caches whose links must be followed, pipes, devices and sockets."""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.checkpoint import draft

HF = "hf2mcore check"
MEGATRON = "mcore2hf check verify"


def reject(base: str = "hf", commands: str = HF, needle: str = "", *more: str) -> Any:
    """A link or special file that must be refused."""
    return attack("reject", base, commands, needle, *more)


def link(path: Path, target: str | Path) -> None:
    """Replace a file by a link."""
    path.unlink(missing_ok=True)
    path.symlink_to(target)


@reject(needle="follow-links")
def shard_links_outside(bench: Bench) -> None:
    """A shard that is a link to another disk: refused, with the option that permits it."""
    link(bench.second, bench.stranger / bench.second.name)


@reject(needle="link|00002")
def shard_links_outside_relative(bench: Bench) -> None:
    """The same with a relative link."""
    assert bench.stranger.is_dir()
    link(bench.second, f"../outside/model/{bench.second.name}")


@attack("ok", "hf", "", "", "hf2mcore {src} {dst} --no-sync --follow-links")
def shard_links_outside_permitted(bench: Bench) -> None:
    """`--follow-links` permits it for weight files."""
    link(bench.second, bench.stranger / bench.second.name)


@reject("hf", "", "config|link", "hf2mcore {src} {dst} --no-sync --follow-links", "plan {src} --follow-links")
def config_links_outside(bench: Bench) -> None:
    """The option is for weights only, never for other files."""
    link(bench.source / "config.json", bench.stranger / "config.json")


@reject("hf", "", "index|link", "hf2mcore {src} {dst} --no-sync --follow-links", "plan {src} --follow-links")
def index_links_outside(bench: Bench) -> None:
    """Nor for the index."""
    link(bench.source / "model.safetensors.index.json", bench.stranger / "model.safetensors.index.json")


@reject()
def shard_links_to_a_secret(bench: Bench) -> None:
    """A shard that is a link to a file which is no shard: its bytes must not be shown."""
    link(bench.second, bench.outside / "secret.txt")


@reject()
def shard_links_in_two_hops(bench: Bench) -> None:
    """A link inside the folder to a link that leaves it."""
    link(bench.source / "hop", bench.stranger / bench.second.name)
    link(bench.second, "hop")


@reject()
def shard_through_a_linked_folder(bench: Bench) -> None:
    """A link into a folder of the input which is itself a link outside."""
    link(bench.source / "folder", bench.stranger)
    link(bench.second, f"folder/{bench.second.name}")


@reject()
def shard_links_to_itself(bench: Bench) -> None:
    """A link that never ends."""
    link(bench.second, bench.second.name)


@reject()
def shard_links_to_nothing(bench: Bench) -> None:
    """A broken link, as after a pruned cache."""
    link(bench.second, "blobs/none")


@reject()
def shard_links_to_a_device(bench: Bench) -> None:
    """A link to /dev/zero, which has no end."""
    link(bench.second, "/dev/zero")


@reject()
def shard_links_to_proc(bench: Bench) -> None:
    """A link to the memory of the process."""
    link(bench.second, "/proc/self/environ")


@reject()
def shard_links_to_sibling_with_same_prefix(bench: Bench) -> None:
    """`source-evil` begins with `source`, and is not inside it."""
    evil = bench.place / "source-evil"
    (bench.stranger).rename(evil)
    link(bench.second, f"../source-evil/{bench.second.name}")


@reject()
def shard_is_a_pipe(bench: Bench) -> None:
    """A pipe, on which an open hangs."""
    bench.second.unlink()
    os.mkfifo(bench.second)


@reject()
def shard_is_a_socket(bench: Bench) -> None:
    """A socket."""
    bench.second.unlink()
    here = Path.cwd()
    os.chdir(bench.source)
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(bench.second.name)
    os.chdir(here)


@reject()
def shard_is_a_folder(bench: Bench) -> None:
    """A folder."""
    bench.second.unlink()
    bench.second.mkdir()


@reject()
def config_is_a_pipe(bench: Bench) -> None:
    """The configuration is a pipe."""
    (bench.source / "config.json").unlink()
    os.mkfifo(bench.source / "config.json")


@reject("hf", "hf2mcore plan")
def config_is_a_folder(bench: Bench) -> None:
    """The configuration is a folder."""
    (bench.source / "config.json").unlink()
    (bench.source / "config.json").mkdir()


@attack("ok", "hf", HF)
def shard_links_inside(bench: Bench) -> None:
    """A link that stays in the folder is ordinary."""
    (bench.source / "blobs").mkdir()
    bench.second.rename(bench.source / "blobs" / "second")
    link(bench.second, "blobs/second")


@attack("ok", "hf", "", "", "hf2mcore {place}/alias {dst} --no-sync", "check {place}/alias", "inspect {place}/alias")
def source_is_a_link(bench: Bench) -> None:
    """The user's own path may be a link: the command line is trusted."""
    (bench.place / "alias").symlink_to(bench.source.name)


@reject("mcore", MEGATRON, "link|distcp")
def distcp_links_outside(bench: Bench) -> None:
    """A payload file that is a link outside."""
    path = bench.folder / "__0_0.distcp"
    path.rename(bench.outside / "__0_0.distcp")
    link(path, bench.outside / "__0_0.distcp")


@reject("mcore", MEGATRON)
def distcp_in_a_linked_folder(bench: Bench) -> None:
    """A payload file in a folder of the checkpoint, which is a link outside."""
    plan = draft()
    for entry in plan.entries.values():
        for chunk in entry.chunks:
            chunk.path = "more/items.distcp"
    plan.lay()
    (bench.outside / "more").mkdir()
    (bench.outside / "more" / "items.distcp").write_bytes(plan.files.pop("more/items.distcp"))
    bench.rewrite(plan)
    (bench.folder / "more").symlink_to(bench.outside / "more")


@reject("mcore", "mcore2hf check inspect verify", "metadata")
def plan_links_outside(bench: Bench) -> None:
    """The plan is a link outside."""
    path = bench.folder / ".metadata"
    path.rename(bench.outside / "plan")
    link(path, bench.outside / "plan")


@reject("mcore", "mcore2hf check inspect", "common|link")
def common_links_outside(bench: Bench) -> None:
    """The state is a link outside."""
    path = bench.folder / "common.pt"
    path.rename(bench.outside / "common.pt")
    link(path, bench.outside / "common.pt")


@reject("mcore", "mcore2hf check inspect", "metadata")
def plan_is_a_pipe(bench: Bench) -> None:
    """The plan is a pipe."""
    (bench.folder / ".metadata").unlink()
    os.mkfifo(bench.folder / ".metadata")


@reject("mcore", "mcore2hf check inspect", "common")
def common_is_a_pipe(bench: Bench) -> None:
    """The state is a pipe."""
    (bench.folder / "common.pt").unlink()
    os.mkfifo(bench.folder / "common.pt")


@reject("mcore", "mcore2hf check inspect", "latest_checkpointed")
def tracker_is_a_pipe(bench: Bench) -> None:
    """The tracker is a pipe."""
    path = bench.source / "latest_checkpointed_iteration.txt"
    path.unlink()
    os.mkfifo(path)


@reject("mcore", "mcore2hf check inspect", "")
def iteration_links_outside(bench: Bench) -> None:
    """The iteration's folder is a link that leaves the checkpoint."""
    bench.folder.rename(bench.outside / "iteration")
    link(bench.folder, bench.outside / "iteration")


@reject("mcore", "mcore2hf check inspect", "")
def release_links_outside(bench: Bench) -> None:
    """`release` is a link that leaves the checkpoint."""
    bench.folder.rename(bench.outside / "iteration")
    link(bench.source / "release", bench.outside / "iteration")
    (bench.source / "latest_checkpointed_iteration.txt").write_text("release")


@attack("ok", "mcore", "mcore2hf check inspect")
def release_links_inside(bench: Bench) -> None:
    """`release` → `iter_0000000`, as this tool writes it."""
    link(bench.source / "release", "iter_0000000")
    (bench.source / "latest_checkpointed_iteration.txt").write_text("release")
