"""A real S3 server on loopback, moto's, behind a layer that counts what is asked and makes requests fail."""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.request import urlopen

BUCKET = "bucket"
KEYS = {"AWS_ACCESS_KEY_ID": "user", "AWS_SECRET_ACCESS_KEY": "a-secret-key", "AWS_REGION": "us-east-1"}
NOBODY = "AWS4-HMAC-SHA256 Credential=user/20260101/us-east-1/s3/aws4_request, SignedHeaders=host, Signature=0"
SLOW_DOWN = b"<Error><Code>SlowDown</Code><Message>Please reduce your request rate.</Message></Error>"
Fault = Callable[[str, str, str], str]  # method, path, range → "", a status, "cut" or "drop"


class Gate:
    """A WSGI application before moto's. asked: method, path with query and range of every request."""

    def __init__(self) -> None:
        from moto.server import DomainDispatcherApplication, create_backend_app

        self._inner = DomainDispatcherApplication(create_backend_app)
        self.asked: list[tuple[str, str, str]] = []
        self.fault: Fault = lambda *request: ""

    def __call__(self, environ: dict[str, Any], start: Callable[..., Any]) -> Iterable[bytes]:
        method, path = environ["REQUEST_METHOD"], f"{environ['PATH_INFO']}?{environ.get('QUERY_STRING', '')}"
        if not environ.get("HTTP_AUTHORIZATION", "").startswith("AWS4"):  # as Google's clients do
            environ["HTTP_AUTHORIZATION"] = NOBODY
        request = method, path, environ.get("HTTP_RANGE", "")
        self.asked.append(request)
        what = self.fault(*request)
        if what.isdigit():
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            start(f"{what} Fault", [("Content-Length", str(len(SLOW_DOWN))), ("Retry-After", "0")])
            return [SLOW_DOWN]
        body = self._inner(environ, start)
        return _cut(body) if what == "cut" else body

    def ranges(self, method: str = "GET") -> list[tuple[str, int, int]]:
        """Object and bytes [start, stop) of every ranged read."""
        found = []
        for asked, path, text in self.asked:
            if asked == method and (match := re.fullmatch(r"bytes=(\d+)-(\d+)", text)):
                found.append((path.partition("?")[0].removeprefix(f"/{BUCKET}/"), int(match[1]), int(match[2]) + 1))
        return found

    def parts(self) -> int:
        """How many parts were sent."""
        return sum("partNumber=" in path for method, path, _ in self.asked if method == "PUT")


def _cut(body: Iterable[bytes]) -> Iterator[bytes]:
    """Half of a body, then the connection ends."""
    whole = b"".join(body)
    yield whole[: len(whole) // 2]
    raise ConnectionAbortedError


class Server:
    """The bucket as tests see it."""

    def __init__(self, gate: Gate, endpoint: str) -> None:
        import botocore.session

        self.gate = gate
        self.environment = KEYS | {"AWS_ENDPOINT_URL": endpoint}
        session = botocore.session.get_session()
        credentials = {"aws_access_key_id": "user", "aws_secret_access_key": "a-secret-key"}
        self.client = session.create_client("s3", endpoint_url=endpoint, region_name="us-east-1", **credentials)
        self.client.create_bucket(Bucket=BUCKET)

    def put(self, folder: Path, name: str) -> str:
        """Copy a folder into the bucket. Returns its URL."""
        for path in sorted(folder.rglob("*")):
            if path.is_file() and not any(part.is_symlink() for part in (path, *path.parents)):
                key = f"{name}/{path.relative_to(folder)}"
                self.client.put_object(Bucket=BUCKET, Key=key, Body=path.read_bytes())
        return f"s3://{BUCKET}/{name}"

    def tree(self, name: str) -> dict[str, bytes]:
        """Every object below a prefix."""
        rows = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=f"{name}/")
        keys = [row["Key"] for page in rows for row in page.get("Contents", ())]
        return {k[len(name) + 1 :]: self.client.get_object(Bucket=BUCKET, Key=k)["Body"].read() for k in keys}

    def leftovers(self) -> list[str]:
        """Uploads that nobody has ended, and work folders."""
        uploads = self.client.list_multipart_uploads(Bucket=BUCKET).get("Uploads", ())
        objects = self.client.list_objects_v2(Bucket=BUCKET).get("Contents", ())
        return [row["Key"] for row in uploads] + [r["Key"] for r in objects if ".partial/" in r["Key"]]

    def quiet(self) -> None:
        """Forget what was asked, and let everything succeed."""
        self.gate.asked.clear()
        self.gate.fault = lambda *request: ""


@contextmanager
def serving() -> Iterator[Server]:
    """A server for the time of the block; the environment of this process leads to it."""
    from werkzeug.serving import WSGIRequestHandler, make_server

    class Silent(WSGIRequestHandler):
        protocol_version = "HTTP/1.1"

        def log(self, type: str, message: str, *args: Any) -> None:
            """Nothing."""

    gate = Gate()
    server = make_server("127.0.0.1", 0, gate, threaded=True, request_handler=Silent)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    before = {name: os.environ.get(name) for name in (*KEYS, "AWS_ENDPOINT_URL")}
    try:
        os.environ |= KEYS | {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{server.server_port}"}
        urlopen(f"{os.environ['AWS_ENDPOINT_URL']}/moto-api/reset", b"", 10).close()  # servers of a process share it
        yield Server(gate, os.environ["AWS_ENDPOINT_URL"])
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.__setitem__(name, value)
        from transcoder.remote import s3

        s3._client.cache_clear()
        server.shutdown()
        thread.join(10)
