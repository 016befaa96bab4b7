"""What users name: a directory, or a URL of an object store."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, cast
from urllib.parse import unquote

from transcoder.errors import PathLike, UsageError

if TYPE_CHECKING:
    from transcoder.remote.paths import Bucket
    from transcoder.remote.store import Store

SCHEMES = ("file", "s3", "gs", "memory", "hf")
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://(.*)", re.DOTALL)


def place(text: PathLike, writing: bool = False) -> Path:
    """A path for a directory's name or URL; objects of a store look like one. Raises UsageError, and what `open` does.

    writing: it is the destination: errors of the store are that, too.
    """
    match = _URL.fullmatch(text) if isinstance(text, str) else None
    if match is None:
        return cast(Path, text) if hasattr(text, "bucket") else Path(text)
    scheme, rest = match.groups()
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UsageError(f"{scheme}://: this kind of URL is not known; give a directory or one of {known}", kind="url")
    if scheme == "file":
        return _local(rest)
    return _opened(scheme, rest, writing)


def places(names: Iterable[str]) -> dict[str, Path]:
    """Paths for absolute names and URLs; a store is opened once."""
    buckets: dict[str, Bucket] = {}
    found = {}
    for name in names:
        match = _URL.fullmatch(name)
        near = next((bucket for url, bucket in buckets.items() if match and name.startswith(f"{url}/")), None)
        found[name] = near.path(name) if near else place(name)
        if match and not near and (there := getattr(found[name], "bucket", None)):
            buckets[there.store.url] = there
    return found


def _local(rest: str) -> Path:
    host, _, path = rest.partition("/")
    if host not in ("", "localhost"):
        raise UsageError(f"file://{host}/: a file's URL names no other host; give file:///path", kind="url")
    return Path("/" + unquote(path))


def _opened(scheme: str, rest: str, writing: bool) -> Path:
    from transcoder.remote.errors import explained, missing_extra
    from transcoder.remote.paths import Bucket, RemotePath, as_path
    from transcoder.remote.store import Failed, tried

    parts = [part for part in rest.split("/") if part]
    depth = 2 if scheme == "hf" else 1
    if len(parts) < depth or ("@" in rest and scheme != "hf") or any(part in (".", "..") for part in parts):
        example = {"hf": "hf://org/name[@revision]"}.get(scheme, f"{scheme}://bucket/folder")
        raise UsageError(f"{scheme}://…: give {example}", kind="url")
    if scheme == "hf" and writing:
        raise UsageError("hf:// can be read only; write to a directory, and push that to the hub", kind="url")
    bucket, url = "/".join(parts[:depth]), f"{scheme}://{rest}"
    try:
        store = tried(lambda: _store(scheme, bucket))
    except ImportError as error:
        raise missing_extra(url, error.name or scheme, writing) from error
    except Failed as failure:
        raise explained(failure, url, writing) from failure
    return as_path(RemotePath(Bucket(store, writing), "/".join(parts[depth:])))


def _store(scheme: str, bucket: str) -> Store:
    if scheme == "s3":
        from transcoder.remote.s3 import S3

        return S3(bucket)
    if scheme == "hf":
        from transcoder.remote.hub import Hub

        name, _, revision = bucket.partition("@")
        return Hub(name, revision)
    from transcoder.remote.objects import Objects, google, memory

    return Objects(f"{scheme}://{bucket}", lambda: memory(bucket) if scheme == "memory" else google(bucket))
