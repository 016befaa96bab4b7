"""Runs one action in a child process with limits, a deadline, and an audit hook that reports what must never happen."""

# ruff: noqa: PTH115, PTH118, PTH119, PTH120 (paths as system calls have them)

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SECONDS, MEMORY, LARGEST_FILE = 10.0, 1 << 30, 1 << 26
CANARY = "ATTACK_CANARY"  # hostile pickles append to the file that this variable names
BAIT = frozenset(
    {"antigravity", "this", "turtle", "pty", "webbrowser", "attack_bait", "pip", "torch", "megatron", "ctypes"}
)
FORBIDDEN = (
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.fork",
    "os.forkpty",
    "os.startfile",
    "pty.spawn",
    "subprocess.Popen",
    "socket.",
    "urllib.",
    "http.",
    "smtplib.",
    "ftplib.",
    "pickle.find_class",
    "code.__new__",
    "webbrowser.open",
    "cpython.run_",
    "sys.set",
    "ctypes.",
    "os.kill",
    "os.putenv",
)
CHANGES = (
    "os.remove",
    "os.rename",
    "os.mkdir",
    "os.rmdir",
    "os.link",
    "os.symlink",
    "os.truncate",
    "os.chmod",
    "os.chown",
    "os.setxattr",
    "os.utime",
    "shutil.rmtree",
    "shutil.move",
)
BUILDERS = ("dataclasses.py", "collections/__init__.py", "functools.py", "enum.py")  # run code of their own making
SYSTEM = (
    "/proc/self/",
    "/proc/meminfo",
    "/proc/sys/kernel/random/boot_id",
    "/proc/mounts",
    "/sys/fs/cgroup",
    "/dev/null",
    "/dev/urandom",
    "/etc/localtime",
    "/usr/share/zoneinfo",
)


@dataclass(frozen=True)
class Ended:
    """How a child ended. `code` is negative for a signal, None when it ran past the deadline."""

    code: int | None
    seconds: float
    peak: int
    out: str
    err: str
    seen: tuple[str, ...]


@dataclass(frozen=True)
class Bounds:
    """Where files may be opened, and where they may be changed."""

    readable: tuple[str, ...]
    writable: tuple[str, ...]


def trusted() -> tuple[str, ...]:
    """The interpreter, its packages and the tool."""
    roots = {sys.prefix, sys.base_prefix, *filter(None, sys.path), str(Path(__file__).parent.parent)}
    return tuple(sorted(os.path.realpath(root) for root in roots))


def inside(path: str, roots: tuple[str, ...]) -> bool:
    """Whether a real path is one of the roots or below one."""
    return any(path == root or path.startswith(root.rstrip("/") + "/") for root in roots)


class Watch:
    """The audit hook: writes what it must not see into a file, and stops the code that did it."""

    def __init__(self, bounds: Bounds, report: int) -> None:
        self.bounds, self.report, self.roots = bounds, report, trusted()
        self.known, self.busy = frozenset(sys.modules), False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self.busy:
            return
        self.busy = True
        try:
            wrong = self.judge(event, arguments)
            if wrong:
                os.write(self.report, (wrong + "\n").encode("ascii", "backslashreplace"))
        finally:
            self.busy = False
        if wrong:
            raise PermissionError(wrong)

    def judge(self, event: str, arguments: tuple[Any, ...]) -> str:
        """What is wrong with an event, or nothing."""
        if event.startswith(FORBIDDEN) and event not in ("sys.settrace", "sys.setprofile"):
            return f"{event} {arguments!r:.200}"
        if event in ("exec", "compile"):
            return self.judge_code(event, arguments)
        if event == "import":
            return self.judge_import(str(arguments[0]))
        if event == "open":
            return self.judge_open(*arguments)
        if event in CHANGES:
            return self.judge_change(event, arguments)
        return ""

    def judge_code(self, event: str, arguments: tuple[Any, ...]) -> str:
        """Code may come from the interpreter's files, or from the few modules that make their own."""
        code, frame = arguments[0], sys._getframe(3)
        file = getattr(code, "co_filename", None) or (str(arguments[1]) if len(arguments) > 1 else "")
        caller = frame.f_code.co_filename
        parses = event == "compile" and caller.endswith("/ast.py")  # a tree of a recipe's size, never run
        if parses or caller.startswith("<frozen importlib") or caller.endswith(BUILDERS):
            return ""
        return f"{event} of {file or code!r:.100} by {caller}"

    def judge_import(self, name: str) -> str:
        """Nothing but the standard library is imported after the start, and none of the bait."""
        top = name.partition(".")[0]
        fine = name in self.known or (top in sys.stdlib_module_names and top not in BAIT)
        return "" if fine else f"import of {name!r:.100}"

    def judge_open(self, path: Any, mode: Any, flags: Any) -> str:
        """Files are opened in the source, the destination, and the interpreter's own folders."""
        if not isinstance(path, (str, bytes, os.PathLike)):
            return ""
        text = os.fsdecode(path)
        if os.sep not in text and text not in ("", "..") and isinstance(flags, int) and mode is None:
            return ""  # below a folder that is open already; `checked_open` looks at what was opened
        writes = isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
        follow = not (isinstance(flags, int) and flags & (os.O_NOFOLLOW | getattr(os, "O_PATH", 0)))
        real = (
            os.path.realpath(text)
            if follow
            else os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
        )
        if text.startswith(SYSTEM) or inside(real, self.bounds.writable):
            return ""
        if not writes and inside(real, (*self.bounds.readable, *self.roots)):
            return ""
        return f"open of {text!r:.200} for {'writing' if writes else 'reading'}"

    def judge_change(self, event: str, arguments: tuple[Any, ...]) -> str:
        """Names change below the destination's parent only."""
        paths = [os.fsdecode(item) for item in arguments if isinstance(item, (str, bytes, os.PathLike))]
        folders = [item for item in arguments if isinstance(item, int) and item >= 0]
        for text in paths[1:] if event == "os.symlink" else paths:
            if os.sep not in text and folders and event not in ("os.chmod", "os.mkdir"):
                text = os.path.join(os.readlink(f"/proc/self/fd/{folders[-1]}"), text)
            real = os.path.join(os.path.realpath(os.path.dirname(text) or "."), os.path.basename(text))
            if not inside(real, self.bounds.writable):
                return f"{event} of {text!r:.200}"
        return ""


def checked_open(watch: Watch) -> None:
    """Judge what `os.open` opened, not what it was asked to open."""
    opens = os.open

    def look(path: Any, flags: int, *rest: Any, **more: Any) -> int:
        place = opens(path, flags, *rest, **more)
        real = os.readlink(f"/proc/self/fd/{place}")
        wrong = watch.judge_open(real, None, flags) if real.startswith("/") else ""
        if wrong:
            os.write(watch.report, (wrong + "\n").encode("ascii", "backslashreplace"))
        return place

    os.open = look


def run(action: Callable[[], int], place: Path, bounds: Bounds, memory: int = MEMORY) -> Ended:
    """What becomes of an action; `place` takes its output."""
    place.mkdir(parents=True, exist_ok=True)
    names = {name: place / name for name in ("out", "err", "seen")}
    started = time.monotonic()
    child = os.fork()
    if not child:
        _live(action, names, bounds, memory)
    code, usage = _wait(child, started + SECONDS)
    texts = {
        name: path.read_bytes().decode("utf-8", "surrogateescape") for name, path in names.items() if path.exists()
    }
    seen = tuple(texts.get("seen", "").splitlines())
    return Ended(code, time.monotonic() - started, usage * 1024, texts.get("out", ""), texts.get("err", ""), seen)


def _wait(child: int, deadline: float) -> tuple[int | None, int]:
    while True:
        done, status, usage = os.wait4(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status), usage.ru_maxrss
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            return None, os.wait4(child, 0)[2].ru_maxrss
        time.sleep(0.003)


def _live(action: Callable[[], int], names: dict[str, Path], bounds: Bounds, memory: int) -> None:
    """The child: never returns."""
    code = 70
    try:
        report = os.open(names["seen"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        for place, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(names[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), place)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        _limit(memory)
        watch = Watch(bounds, report)
        checked_open(watch)
        sys.addaudithook(watch)
        code = action()
    except BaseException as error:
        code = _status(error)
    finally:
        _flush()
        os._exit(code)


def _limit(memory: int) -> None:
    seconds = int(SECONDS)
    limits = (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_FSIZE, LARGEST_FILE),
        (resource.RLIMIT_CORE, 0),
    )
    for what, limit in limits:
        resource.setrlimit(what, (limit, limit))


def _status(error: BaseException) -> int:
    if isinstance(error, SystemExit):
        return error.code if isinstance(error.code, int) else 0 if error.code is None else 1
    sys.__excepthook__(type(error), error, error.__traceback__)
    return 70


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            continue
