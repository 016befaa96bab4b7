"""What a disk holds after a power loss: only contents and folder entries that somebody flushed are sure to be there."""

from __future__ import annotations

import os
import random
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

Place = tuple[int, bytes | str | None]  # the number, and what is there
State = dict[str, Place]  # by path
Tree = dict[str, bytes | str | None]  # by path below the folder: a file's bytes, where a link leads, None for a folder
Entries = dict[int, dict[str, int]]  # of every folder: names and the numbers of what they name
Change = tuple[int, str, int | None]  # in a folder, this name means this number, or nothing any longer
BLOCK = 64  # bytes: as small for these models as a page is for real ones
ROOT = 0
_REAL = os.open, os.close, os.fstat, os.lstat, os.read, os.readlink, os.listdir  # before anybody patches them
_NAMES = os.link, os.rename, os.unlink, os.rmdir, os.mkdir, os.pwrite, os.ftruncate


@dataclass
class Node:
    """A file, link or folder, held so that its number is not given to another one."""

    pin: int
    durable: bytes = b""
    target: str | None = None
    folder: bool = False

    def current(self) -> bytes:
        """The bytes that a process sees."""
        return contents(self.pin)


@dataclass
class Disk:
    """A folder as processes see it and as it would be found after a power loss now; at first the two are the same.

    What is removed goes to a yard, a folder beside it, so that a state of before can have it back with its number.
    """

    top: Path
    nodes: dict[int, Node] = field(default_factory=dict)
    entries: Entries = field(default_factory=dict)
    pending: list[list[Change]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.yard = self.top.with_name(f"{self.top.name} yard")
        shutil.rmtree(self.yard, ignore_errors=True)
        self.yard.mkdir()
        self._walk(self.top)

    def _walk(self, folder: Path) -> None:
        here = self.number(folder)
        self.nodes.setdefault(here, Node(_pin(folder), folder=True))
        names = self.entries.setdefault(here, {})
        for name in _REAL[6](folder):
            names[name] = self._known(folder / name)
            node = self.nodes[names[name]]
            node.durable = b"" if node.folder or node.target is not None else node.current()
            if node.folder:
                self._walk(folder / name)

    def number(self, path: Path) -> int:
        """What the file system calls this file."""
        return _REAL[3](path).st_ino

    def _known(self, path: Path) -> int:
        number = self.number(path)
        if number not in self.nodes:
            mode = _REAL[3](path).st_mode
            target = _REAL[5](path) if stat.S_ISLNK(mode) else None
            self.nodes[number] = Node(_pin(path), b"", target, stat.S_ISDIR(mode))
            if stat.S_ISDIR(mode):
                self.entries.setdefault(number, {})
        return number

    def created(self, path: Path) -> None:
        """A file, link or folder of this name is new."""
        self.pending.append([(self.number(path.parent), path.name, self._known(path))])

    def removed(self, path: Path) -> None:
        """The name is gone."""
        self.pending.append([(self.number(path.parent), path.name, None)])

    def renamed(self, old: Path, new: Path) -> None:
        """One name took the place of another."""
        gone, there = (self.number(old.parent), old.name, None), (self.number(new.parent), new.name, self._known(new))
        self.pending.append([gone, there])

    def bury(self, path: Path) -> bool:
        """Remove a file, link or empty folder so that it can come back. Returns False if there is none."""
        try:
            facts = _REAL[3](path)
        except FileNotFoundError:
            return False
        if stat.S_ISDIR(facts.st_mode) and _REAL[6](path):
            return False
        self._known(path)
        grave = self.yard / str(facts.st_ino)
        if os.path.lexists(grave):
            _NAMES[2](path)
        else:
            _NAMES[1](path, grave)
        return True

    def exchanged(self, one: Path, two: Path) -> None:
        """Two names changed places."""
        self.pending.append([(self.number(path.parent), path.name, self._known(path)) for path in (one, two)])

    def synced(self, file: int) -> None:
        """Everything done to an open file or folder is on the disk; a rename is there in both of its folders."""
        number = _REAL[2](file).st_ino
        node = self.nodes.get(number)
        if node is not None and node.folder:
            for change in [change for change in self.pending if any(number == row[0] for row in change)]:
                _apply(self.entries, change)
                self.pending.remove(change)
        elif node is not None:
            node.durable = node.current()

    def lose(self, file: int) -> None:
        """Flushing a file failed: what was not flushed before is forgotten, its place stays."""
        node = self.nodes.get(_REAL[2](file).st_ino)
        if node is not None and not node.folder:
            _rewrite(f"/proc/self/fd/{node.pin}", _padded(node))

    def states(self, seed: int = 0) -> Iterator[tuple[str, State]]:
        """What may be found, in words and as a state."""
        count, chance = len(self.pending), random.Random(seed)
        yield "no unflushed data", self._state(count, _padded)
        yield "no unflushed data, not even its place", self._state(count, lambda node: node.durable)
        yield "nothing unflushed", self._state(0, lambda node: node.durable)
        yield "no unflushed entries", self._state(0, Node.current)
        yield "half of the entries", self._state(count // 2, _padded)
        yield "all entries but the last", self._state(max(0, count - 1), lambda node: node.durable)
        yield "some blocks", self._state(count, lambda node: _mixed(node, chance))

    def now(self) -> State:
        """What a process finds."""
        return self._state(len(self.pending), Node.current)

    def _state(self, count: int, found: Callable[[Node], bytes]) -> State:
        entries = {number: dict(names) for number, names in self.entries.items()}
        for change in self.pending[:count]:
            _apply(entries, change)
        state: State = {}
        self._list(self.number(self.top), "", entries, found, state)
        return state

    def _list(self, number: int, path: str, entries: Entries, found: Callable[[Node], bytes], state: State) -> None:
        for name, inner in sorted(entries.get(number, {}).items()):
            node, below = self.nodes[inner], f"{path}{name}"
            state[below] = inner, None if node.folder else found(node) if node.target is None else node.target
            if node.folder:
                self._list(inner, f"{below}/", entries, found, state)

    def make(self, state: State) -> None:
        """Let the folder hold exactly this, under the same numbers."""
        for folder, names, files in os.walk(self.top, topdown=False):
            for name in (*files, *names):
                self.bury(Path(folder) / name)
        for name, (number, found) in state.items():
            grave = self.yard / str(number)
            if found is None:
                _NAMES[1](grave, self.top / name)
            else:
                _NAMES[0](grave, self.top / name, follow_symlinks=False)
            if isinstance(found, bytes):
                _rewrite(self.top / name, found)

    def close(self) -> None:
        """Let go of everything."""
        while self.nodes:
            _REAL[1](self.nodes.popitem()[1].pin)
        shutil.rmtree(self.yard)


def _rewrite(path: str | Path, data: bytes) -> None:
    file = _REAL[0](path, os.O_WRONLY)
    try:
        _NAMES[6](file, 0)
        _NAMES[5](file, data, 0)
    finally:
        _REAL[1](file)


def tree_of(state: State) -> Tree:
    """The state without numbers."""
    return {name: found for name, (_, found) in state.items()}


def _pin(path: Path) -> int:
    return _REAL[0](path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)


def contents(pin: int) -> bytes:
    """The bytes of an open file, wherever it stands."""
    again = _REAL[0](f"/proc/self/fd/{pin}", os.O_RDONLY)
    try:
        return _REAL[4](again, _REAL[2](again).st_size)
    finally:
        _REAL[1](again)


def _apply(entries: Entries, change: list[Change]) -> None:
    for folder, name, number in change:
        names = entries.setdefault(folder, {})
        if number is None:
            names.pop(name, None)
        else:
            names[name] = number


def _padded(node: Node) -> bytes:
    size = _REAL[2](node.pin).st_size
    return node.durable[:size].ljust(size, b"\0")


def _mixed(node: Node, chance: random.Random) -> bytes:
    """Some blocks are new, the others as they were flushed."""
    old, new = _padded(node), node.current()
    return b"".join(chance.choice((old, new))[at : at + BLOCK] for at in range(0, len(new), BLOCK))


def restore(top: Path, tree: Tree) -> None:
    """Make a folder hold exactly this."""
    for entry in top.iterdir():
        shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
    for name, found in tree.items():
        if found is None:
            (top / name).mkdir()
        elif isinstance(found, str):
            (top / name).symlink_to(found)
        else:
            (top / name).write_bytes(found)


def snapshot(top: Path) -> Tree:
    """What a folder holds."""
    tree: Tree = {}
    for path in sorted(top.rglob("*")):
        link = path.is_symlink()
        tree[path.relative_to(top).as_posix()] = (
            str(path.readlink()) if link else None if path.is_dir() else path.read_bytes()
        )
    return tree
