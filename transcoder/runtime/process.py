"""One process of a job: its place, its device, and how a failure ends the whole job with one message.

A process that fails says so, if no other has before, and leaves at once without a goodbye to its process groups:
torchrun then ends the others, which die in whatever collective they wait in because no signal handler is installed.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from io import TextIOWrapper
from typing import Any, NoReturn

import click

from transcoder.console import REPORT_US
from transcoder.errors import OutputError, TranscoderError, UsageError
from transcoder.runtime.voice import Voice

PATIENCE = timedelta(days=7)
STORE_TIMEOUT = timedelta(seconds=5)
LOST = ("connection closed by peer", "connection reset by peer", "nccl", "gloo", "broken pipe", "socket")
NEEDS = "install the runtime: pip install 'megatron-transcoder[runtime]'"

_rooms: dict[str, Any] = {}


@dataclass(frozen=True)
class Place:
    """Where this process stands in the job."""

    rank: int = 0
    world: int = 1
    local: int = 0  # among the processes of this host


def place() -> Place:
    """As torchrun's environment says; alone without one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        return Place()
    return Place(*(int(os.environ.get(name, "0")) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")))


def choose_device(wanted: str | None) -> str:
    """cpu or cuda; hides the GPUs from everything where cpu is wanted. Raises UsageError where there is no GPU."""
    if wanted == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted == "cuda" and not count:
        raise UsageError("--device cuda: there is no CUDA device here; --device cpu works everywhere", kind="device")
    if wanted != "cpu" and 0 < count <= place().local:
        message = (
            f"--device cuda: every process needs a GPU of its own, and this host has {count}; --device cpu needs none"
        )
        raise UsageError(message, kind="device")
    return "cuda" if count else "cpu"


def waiting_room() -> Any:
    """A group of all processes in which some may wait while another works for hours; every process asks together.

    The time-outs of ordinary groups would end the job. A process that is lost still ends the waiting at once: its
    connections close.
    """
    import torch.distributed as dist

    if _rooms.get("world") is not dist.group.WORLD:
        _rooms.update(world=dist.group.WORLD, room=dist.new_group(backend="gloo", timeout=PATIENCE))
    return _rooms["room"]


def exchanged(value: Any) -> list[Any]:
    """The values of all processes in the order of their ranks, however late one comes."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value, group=waiting_room())
    return parts


def shared(value: Any) -> Any:
    """The first process's value, on every process."""
    return exchanged(value)[0]


def _is_first_to_fail() -> bool:
    """Whether no other process of the job has told a failure; true where torchrun's store cannot be asked."""
    here = place()
    if here.world == 1 or os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return True
    try:
        import torch.distributed as dist

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, is_master=False, timeout=STORE_TIMEOUT)
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        return int(store.add(f"transcoder/failed/{attempt}", 1)) == 1
    except Exception:
        return True


def _told(error: BaseException) -> tuple[str, int]:
    """What to say about an exception, and the exit status."""
    if isinstance(error, TranscoderError):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted", 130
    if isinstance(error, ModuleNotFoundError):
        return f"{error}; {NEEDS}", OutputError.exit_code
    if isinstance(error, OSError):
        return str(error), OutputError.exit_code
    if isinstance(error, RuntimeError) and place().world > 1 and any(word in str(error).lower() for word in LOST):
        return f"another process of this job was lost: {error}", OutputError.exit_code
    return f"{type(error).__name__}: {error}; {REPORT_US}", TranscoderError.exit_code


def fail(error: BaseException, voice: Voice) -> int:
    """Tell a failure once a job. Returns the exit status."""
    text, status = _told(error)
    if _is_first_to_fail():
        voice.refuse(error, text, status)
        sys.stderr.flush()
    return status


def guarded(work: Callable[[], int], voice: Voice) -> int:
    """Do the work. Returns the exit status; a job's process that fails does not come back."""
    try:
        status = work()
        _part()
        return status
    except KeyboardInterrupt as error:
        status = fail(error, voice) if voice.as_json else 130
    except Exception as error:
        status = fail(error, voice)
    if place().world > 1:
        with suppress(OSError, ValueError):
            sys.stdout.flush()
        os._exit(status)
    return status


def _part() -> None:
    """Leave the process groups, when every process has come so far."""
    if "torch" not in sys.modules:
        return
    import torch.distributed as dist

    if dist.is_initialized():
        if dist.get_world_size() > 1:
            dist.barrier()
        from transcoder.runtime.device import shutdown

        shutdown()


def hush() -> None:
    """Keep what libraries remark while they are imported off the terminal."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def enter(command: click.Command) -> NoReturn:
    """Run a command as this process's program: usage errors end the job like all others."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    hush()
    try:
        status = command.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        status = stop.exit_code
    except click.ClickException as error:
        voice = Voice(command.name or "", "--json" in sys.argv)
        status = fail(UsageError(error.format_message(), kind="usage"), voice)
    sys.exit(status or 0)
