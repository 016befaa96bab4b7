"""Real processes that convert between buckets: killed and resumed, stopped, short of memory, without the extra."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from command_line import EXAMPLE, PATIENCE, command_of, transcode, tree
from remote_server import Server, serving

SMALL = """
import transcoder.engine as engine, transcoder.remote.uploads as uploads, transcoder.remote.journal as journal
engine.BAND, uploads.PART, journal.SECONDS = 16384, 65536, 0.05
"""
SLOW = (
    SMALL
    + """
import time
from transcoder.progress import Tally
moved = Tally.moved
Tally.moved = lambda self, size: (moved(self, size), time.sleep(0.02))
"""
)
IMPATIENT = "import transcoder.remote.store as store\nstore.FIRST_PAUSE = 0.01"
SYNTHETIC = Path(__file__).parent.parent / "benchmarks" / "synthetic.py"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that takes small parts, with the example model at hf/ and as a Megatron checkpoint at mcore/."""
    with pytest.MonkeyPatch.context() as patch, serving() as found:
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
        found.put(EXAMPLE, "hf")
        made = transcode(*_line("hf2mcore", "mcore"), driver=SMALL)
        assert made.code == 0, made.err
        yield found


def _line(command: str, target: str) -> list[str]:
    source = "hf" if command == "hf2mcore" else "mcore"
    grid = ["--tp", "2", "--iteration", "0"] if command == "hf2mcore" else []
    return [command, f"s3://bucket/{source}", f"s3://bucket/{target}", *grid]


def stopped_after(server: Server, line: list[str], parts: int, how: signal.Signals = signal.SIGKILL) -> tuple[int, str]:
    """Start it, and send it a signal once it has sent some parts. Its status and stderr."""
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([*command_of(SLOW), *line], **streams)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + PATIENCE
        while server.gate.parts() < parts:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.005)
        process.send_signal(how)
        _, said = process.communicate(timeout=PATIENCE)
    finally:
        process.kill()
    return process.returncode, said


@pytest.mark.parametrize("command", ["hf2mcore", pytest.param("mcore2hf", marks=pytest.mark.slow)])
def test_a_killed_run_goes_on_and_sends_no_part_again(server: Server, command: str) -> None:
    target = f"killed-{command}"
    server.quiet()
    assert stopped_after(server, _line(command, target), 14, signal.SIGKILL)[0] == -signal.SIGKILL
    before = server.gate.parts()
    refused = transcode(*_line(command, target), driver=SMALL)
    assert (refused.code, "--resume" in refused.err, "Traceback" in refused.err) == (4, True, False), refused.err
    server.quiet()
    done = transcode(*_line(command, target), "--resume", driver=SMALL)
    assert done.code == 0, done.err
    whole = server.tree("mcore") if command == "hf2mcore" else tree(EXAMPLE)
    assert server.tree(target) == whole
    assert server.leftovers() == []
    sizes = [len(data) for name, data in whole.items() if name.endswith((".distcp", ".safetensors"))]
    needed = sum(-(-size // 65536) for size in sizes)
    assert needed <= before + server.gate.parts() <= needed + 4  # what was on its way when it was killed


@pytest.mark.slow
def test_a_stopped_run_says_so_and_goes_on(server: Server) -> None:
    server.quiet()
    code, said = stopped_after(server, _line("hf2mcore", "stopped"), 10, signal.SIGTERM)
    assert (code, "continue with --resume" in said, "Traceback" in said) == (143, True, False), said
    done = transcode(*_line("hf2mcore", "stopped"), "--resume", driver=SMALL)
    assert done.code == 0, done.err
    assert server.tree("stopped") == server.tree("mcore")


@pytest.mark.slow
def test_starting_anew_drops_what_a_killed_run_sent(server: Server) -> None:
    server.quiet()
    stopped_after(server, _line("hf2mcore", "dropped"), 10, signal.SIGKILL)
    assert server.leftovers() != []
    done = transcode(*_line("hf2mcore", "dropped"), "--overwrite", driver=SMALL)
    assert done.code == 0, done.err
    assert server.tree("dropped") == server.tree("mcore")
    assert server.leftovers() == []


def test_two_runs_do_not_share_a_destination(server: Server) -> None:
    server.quiet()
    streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    first = subprocess.Popen([*command_of(SLOW), *_line("hf2mcore", "shared")], **streams)  # type: ignore[call-overload]
    try:
        deadline = time.monotonic() + PATIENCE
        while server.gate.parts() < 3:
            assert first.poll() is None and time.monotonic() < deadline
            time.sleep(0.005)
        second = transcode(*_line("hf2mcore", "shared"), "--resume", driver=SMALL)
        assert (second.code, f"process {first.pid}" in second.err) == (4, True), second.err
        assert first.poll() is None
    finally:
        first.kill()
        first.communicate()


def test_wrong_credentials_are_one_line_without_a_secret(server: Server) -> None:
    for words, code in ((("s3://bucket/hf", "/tmp/nowhere"), 3), ((EXAMPLE, "s3://bucket/x"), 4)):
        found = transcode("hf2mcore", *words, "--json", driver=IMPATIENT, AWS_ENDPOINT_URL="http://127.0.0.1:9")
        assert found.code == 4, found.err  # nobody listens there: the store is lost
        assert found.report["error"]["kind"] == "lost-remote"
        home = {"AWS_ACCESS_KEY_ID": "", "AWS_SECRET_ACCESS_KEY": "", "AWS_EC2_METADATA_DISABLED": "true", "HOME": "/"}
        found = transcode("hf2mcore", *words, **home)
        assert (found.code, "AWS_ACCESS_KEY_ID" in found.err, "Traceback" in found.err) == (code, True, False), (
            found.err
        )


WITHOUT = """
import sys
class Nothing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("botocore", "obstore", "huggingface_hub"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Nothing())
"""


@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket/x", "hf://org/name", "memory://a/b"])
def test_without_the_extra_the_message_names_it(url: str, tmp_path: Path) -> None:
    found = transcode("hf2mcore", url, tmp_path / "x", driver=WITHOUT)
    assert (found.code, "[remote]" in found.err, url in found.err) == (3, True, True), found.err
    if not url.startswith("hf:"):
        found = transcode("hf2mcore", EXAMPLE, url, driver=WITHOUT)
        assert (found.code, "[remote]" in found.err) == (4, True), found.err


def test_local_conversions_import_no_client(tmp_path: Path) -> None:
    found = transcode("hf2mcore", EXAMPLE, tmp_path / "x", driver=WITHOUT)
    assert found.code == 0, found.err


@pytest.mark.slow
def test_memory_stays_bounded_when_both_sides_are_larger(server: Server, tmp_path: Path) -> None:
    sizes = {"layers": 4, "hidden": 1024, "ffn": 4096, "heads": 16, "kv-heads": 8, "vocabulary": 32000, "shard-mb": 60}
    options = [word for name, size in sizes.items() for word in (f"--{name}", str(size))]
    subprocess.run([sys.executable, SYNTHETIC, tmp_path / "hf", *options], check=True, capture_output=True, timeout=60)
    source, total = server.put(tmp_path / "hf", "large"), sum(p.stat().st_size for p in (tmp_path / "hf").iterdir())
    bound = (48 + 96) << 20
    assert total > 1.2 * bound
    grid = ["--tp", "2", "--memory", "48MiB"]
    assert _peak(["hf2mcore", source, "s3://bucket/large-mcore", *grid]) < bound
    assert _peak(["mcore2hf", "s3://bucket/large-mcore", "s3://bucket/large-back", "--memory", "48MiB"]) < bound
    assert server.tree("large-back") == tree(tmp_path / "hf")


def _peak(line: list[str]) -> int:
    """The most anonymous memory of a command that ends well, in bytes."""
    process = subprocess.Popen([*command_of(), *line, "--quiet"], env=os.environ, stderr=subprocess.PIPE, text=True)
    most, deadline = 0, time.monotonic() + 2 * PATIENCE
    try:
        while process.poll() is None:
            assert time.monotonic() < deadline
            try:
                rows = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            except ProcessLookupError:
                break
            found = [int(row.split()[1]) << 10 for row in rows if row.startswith("RssAnon:")]
            most = max([most, *found])
            time.sleep(0.01)
        assert process.wait(PATIENCE) == 0, process.stderr.read() if process.stderr else ""
    finally:
        process.kill()
        process.communicate()
    return most
