"""The other kinds of store: Google's, the hub, and one that lives in the process. Their servers stand on loopback."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from command_line import EXAMPLE, transcode, tree
from remote_server import Server, serving

import transcoder
from transcoder import reading
from transcoder.errors import InputError, OutputError

GRID = {"tp": 2, "iteration": 0}
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def mcore(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model as a Megatron checkpoint."""
    transcoder.hf2mcore(EXAMPLE, tmp_path_factory.mktemp("mcore") / "mcore", **GRID)
    return next(tmp_path_factory.getbasetemp().glob("mcore*/mcore"))


def test_a_store_of_the_process_itself_takes_and_gives_everything(mcore: Path, tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, "memory://one/mcore", verify=True, **GRID)
    transcoder.reshard("memory://one/mcore", "memory://one/again", tp=4, iteration=0)
    transcoder.mcore2hf("memory://one/again", "memory://two/hf", verify=True)
    assert reading.verify(mcore, "memory://one/again")["differences"] == []
    transcoder.mcore2hf("memory://one/mcore", tmp_path / "hf")
    assert tree(tmp_path / "hf") == tree(EXAMPLE)
    with pytest.raises(OutputError, match="exists and is not empty"):
        transcoder.hf2mcore(EXAMPLE, "memory://one/mcore", **GRID)
    transcoder.hf2mcore(EXAMPLE, "memory://one/mcore", overwrite=True, **GRID)
    assert reading.check("memory://one/mcore")["checked"]["checksums"] > 10


def test_a_source_that_is_not_there_is_refused_everywhere(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory"):
        transcoder.hf2mcore("memory://empty/hf", tmp_path / "x")


def test_a_bucket_of_google_is_read_and_written(mcore: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        _google(server, tmp_path, monkeypatch)
        server.put(EXAMPLE, "hf")
        transcoder.hf2mcore("gs://bucket/hf", "gs://bucket/mcore", **GRID)
        assert server.tree("mcore") == tree(mcore)
        transcoder.mcore2hf("gs://bucket/mcore", "gs://bucket/back")
        assert server.tree("back") == tree(EXAMPLE)
        assert server.leftovers() == []


@pytest.mark.slow
def test_a_busy_bucket_of_google_is_asked_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving() as server:
        _google(server, tmp_path, monkeypatch)
        server.put(EXAMPLE, "hf")
        transcoder.hf2mcore(EXAMPLE, tmp_path / "here", **GRID)
        _busy(server)
        transcoder.hf2mcore("gs://bucket/hf", tmp_path / "there", **GRID)
        assert tree(tmp_path / "there") == tree(tmp_path / "here")


def _google(server: Server, folder: Path, patch: pytest.MonkeyPatch) -> None:
    """Let gs:// lead to a server of S3: the two interfaces agree in all that is used here."""
    key = {"gcs_base_url": server.environment["AWS_ENDPOINT_URL"], "disable_oauth": True}
    key |= {"client_email": "", "private_key": "", "private_key_id": ""}
    (folder / "key.json").write_text(json.dumps(key))
    patch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(folder / "key.json"))
    patch.setenv("GOOGLE_SERVICE_ACCOUNT", str(folder / "key.json"))


def _busy(server: Server) -> None:
    """From now on the first try of every other request fails."""
    seen: set[tuple[str, str, str]] = set()

    def fault(*request: str) -> str:
        new = request not in seen
        seen.add(request)  # type: ignore[arg-type]
        return "503" if new and len(seen) % 2 else ""

    server.gate.fault = fault


class Hub(BaseHTTPRequestHandler):
    """One repository with one commit; files come from another address, as large ones do on the hub."""

    protocol_version = "HTTP/1.1"
    asked: list[str]
    token = ""

    def do_GET(self) -> None:
        self.asked.append(self.path)
        if self.token and self.headers.get("authorization") != f"Bearer {self.token}":
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif self.path.startswith("/api/models/org/name"):
            self._send(200, json.dumps(_repository()).encode(), {"Content-Type": "application/json"})
        elif self.path.startswith(f"/org/name/resolve/{COMMIT}/"):
            name = self.path.rpartition(f"{COMMIT}/")[2]
            self._send(302, b"", {"Location": f"/elsewhere/{name}"})
        elif self.path.startswith("/elsewhere/"):
            self._range((EXAMPLE / self.path.removeprefix("/elsewhere/")).read_bytes())
        else:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})

    def _range(self, data: bytes) -> None:
        found = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("range", ""))
        assert found, "a file was asked for as a whole"
        self._send(206, data[int(found[1]) : int(found[2]) + 1], {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def _repository() -> dict[str, object]:
    rows = []
    for path in sorted(EXAMPLE.iterdir()):
        data = path.read_bytes()
        row: dict[str, object] = {"rfilename": path.name, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
        if path.suffix == ".safetensors":
            row["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
        rows.append(row)
    return {"id": "org/name", "modelId": "org/name", "sha": COMMIT, "siblings": rows, "private": False, "tags": []}


@contextmanager
def _hub(token: str = "") -> Iterator[tuple[dict[str, str], list[str]]]:
    handler = type("Handler", (Hub,), {"asked": [], "token": token})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        endpoint = f"http://127.0.0.1:{server.server_port}"
        yield {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}, handler.asked
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_repository_of_the_hub_is_converted_without_a_download(mcore: Path, tmp_path: Path) -> None:
    with _hub() as (environment, asked):
        options = ["--tp", "2", "--iteration", "0"]
        done = transcode(
            "hf2mcore", "hf://org/name@main", tmp_path / "m", *options, HF_HOME=str(tmp_path), **environment
        )
        assert done.code == 0, done.err
        assert tree(tmp_path / "m") == tree(mcore)
        assert any("model-00002" in path for path in asked)
        assert not (tmp_path / "hub").exists()


def test_a_repository_that_nobody_may_see_is_one_message(tmp_path: Path) -> None:
    with _hub(token="another") as (environment, _):
        found = transcode("inspect", "hf://org/name", HF_TOKEN="my-token", **environment)
        assert (found.code, "HF_TOKEN" in found.err, "my-token" in found.err) == (3, True, False), found.err
    with _hub() as (environment, _):
        found = transcode("inspect", "hf://org/other", **environment)
        assert (found.code, "hf://org/other" in found.err, "Traceback" in found.err) == (3, True, False), found.err
        found = transcode("hf2mcore", EXAMPLE, "hf://org/name", **environment)
        assert (found.code, "read only" in found.err) == (2, True), found.err
