"""SHA-256 of whole files, on request: for signing, for stores that ask for it, and against attackers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from transcoder.errors import Problem, UsageError, reason, refuse
from transcoder.paths import open_regular, read_small

SUMS = "SHA256SUMS"  # in a Hugging Face directory, as sha256sum writes it
LIMIT = 1 << 24  # bytes of it
PIECE = 1 << 20  # bytes of one read
KINDS = ("", "sha256")


def check_kind(kind: str) -> None:
    """Refuse an unknown `--checksums`. Raises UsageError."""
    if kind not in KINDS:
        raise UsageError(f"--checksums {kind}: give sha256", kind="checksums")


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open_regular(path, follow_links=True) as file:
        while data := file.read(PIECE):
            digest.update(data)
    return digest.hexdigest()


def sums(folder: Path, names: Iterable[str], workers: int) -> dict[str, str]:
    """The SHA-256 of files below `folder`. Raises OSError."""
    found = sorted(names)
    with ThreadPoolExecutor(max(1, workers)) as pool:
        return dict(zip(found, pool.map(lambda name: sha256_of(folder / name), found), strict=True))


def files_below(folder: Path) -> list[str]:
    """Names of all regular files below `folder`, but for the list of sums."""
    paths = (path for path in folder.rglob("*") if path.is_file() and not path.is_symlink())
    return sorted(name for path in paths if (name := str(path.relative_to(folder))) != SUMS)


def text(found: Mapping[str, str]) -> bytes:
    """The list as sha256sum writes and checks it."""
    return "".join(f"{digest}  {name}\n" for name, digest in sorted(found.items())).encode()


def read(folder: Path) -> dict[str, str]:
    """The sums that a folder's list has, by file name; empty where there is none. Raises InputError."""
    if not (folder / SUMS).is_file():
        return {}
    try:
        data = read_small(folder / SUMS, LIMIT)
    except (OSError, ValueError) as error:
        raise refuse(
            "checksums", "the list of sums cannot be read", [Problem(file=SUMS, found=reason(error))]
        ) from error
    return _parsed(data)


def _parsed(data: bytes) -> dict[str, str]:
    found = {}
    for line in data.decode(errors="replace").splitlines():
        digest, _, name = line.partition("  ")
        parts = Path(name).parts
        if len(digest) != 64 or not name or name.startswith("/") or ".." in parts:
            raise refuse("checksums", f"{SUMS} is not a list of SHA-256 sums", [Problem(file=SUMS, found=line)])
        found[name] = digest
    return found


def changed(folder: Path, expected: Mapping[str, str], workers: int) -> Iterator[Problem]:
    """Files that are not there or have another sum."""
    present = [name for name in expected if (folder / name).is_file()]
    found = sums(folder, present, workers)
    for name, digest in expected.items():
        if found.get(name) != digest:
            yield Problem(file=name, expected=f"sha256:{digest}", found=f"sha256:{found.get(name, 'no such file')}")
