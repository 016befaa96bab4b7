"""How fast each client reads ranges of 4 MiB from a server on loopback that does nothing but send bytes.

python benchmarks/object_stores.py [SECONDS]
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SIZE, RANGE = 256 << 20, 4 << 20
BODY = bytes(RANGE)


class Ranges(BaseHTTPRequestHandler):
    """An object of zeros."""

    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """The range that was asked for."""
        start, stop = map(int, self.headers["range"].removeprefix("bytes=").split("-"))
        self.send_response(206)
        for name, value in {
            "Content-Length": stop + 1 - start,
            "Content-Range": f"bytes {start}-{stop}/{SIZE}",
            "ETag": '"one"',
            "Last-Modified": "Thu, 01 Jan 2026 00:00:00 GMT",
        }.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(memoryview(BODY)[: stop + 1 - start])

    def log_message(self, *arguments: object) -> None:
        """Nothing."""


def serve(port: int) -> None:
    """Until it is terminated."""
    ThreadingHTTPServer(("127.0.0.1", port), Ranges).serve_forever()


def botocore_reader(endpoint: str) -> Callable[[int], int]:
    """What transcode uses for s3://."""
    os.environ |= {"AWS_ENDPOINT_URL": endpoint, "AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b"}
    from transcoder.remote.s3 import S3

    store = S3("bucket")
    return lambda start: len(store.read("object", start, start + RANGE, '"one"'))


def obstore_reader(endpoint: str) -> Callable[[int], int]:
    """obstore's client for S3."""
    import obstore
    from obstore.store import S3Store

    options: Any = {"endpoint": endpoint, "access_key_id": "a", "secret_access_key": "b", "region": "us-east-1"}
    store = S3Store("bucket", **options, client_options={"allow_http": True})
    return lambda start: len(bytes(obstore.get_range(store, "object", start=start, length=RANGE)))


def measure(read: Callable[[int], int], threads: int, seconds: float) -> tuple[float, float]:
    """Gigabytes per second, and processor seconds per gigabyte."""
    began, spent, count = time.perf_counter(), time.process_time(), 0
    with ThreadPoolExecutor(threads) as pool:
        while time.perf_counter() - began < seconds:
            count += sum(pool.map(read, range(0, SIZE, RANGE)))
    return count / (time.perf_counter() - began) / 1e9, (time.process_time() - spent) / count * 1e9


def main() -> None:
    """Print a row per client and number of threads."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("seconds", nargs="?", type=float, default=3.0)
    seconds = parser.parse_args().seconds
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = multiprocessing.get_context("spawn").Process(target=serve, args=(port,), daemon=True)
    server.start()
    try:
        time.sleep(1)
        for name, make in (("botocore", botocore_reader), ("obstore", obstore_reader)):
            read = make(f"http://127.0.0.1:{port}")
            for threads in (1, 4):
                speed, cost = measure(read, threads, seconds)
                print(f"{name:10} {threads} threads  {speed:6.2f} GB/s  {cost:6.2f} s of processor per GB")
    finally:
        server.terminate()


if __name__ == "__main__":
    main()
