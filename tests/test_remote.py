"""Object stores as source and destination: a real S3 server on loopback, in every direction, and when it fails."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from command_line import EXAMPLE, tree
from remote_server import Server, serving

import transcoder
from transcoder import reading
from transcoder.errors import InputError, OutputError, RemoteError, UsageError
from transcoder.remote import store, uploads

GRID = {"tp": 2, "pp": 2, "iteration": 0}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server with the example model at hf/."""
    with pytest.MonkeyPatch.context() as patch, serving() as found:
        patch.setattr(store, "FIRST_PAUSE", 0.01)
        found.put(EXAMPLE, "hf")
        yield found


@pytest.fixture(autouse=True)
def calm(server: Server) -> Iterator[None]:
    """Every test begins with a server that does what it is asked, and leaves nothing unfinished."""
    server.quiet()
    yield
    server.quiet()
    assert server.leftovers() == []


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """What local conversions give."""
    root = tmp_path_factory.mktemp("local")
    transcoder.hf2mcore(EXAMPLE, root / "mcore", **GRID)
    transcoder.reshard(root / "mcore", root / "again", iteration=0, layout="per-layer")
    return {"mcore": root / "mcore", "again": root / "again"}


def test_both_sides_in_a_bucket_give_the_same_bytes_as_on_a_disk(server: Server, local: dict[str, Path]) -> None:
    transcoder.hf2mcore("s3://bucket/hf", "s3://bucket/there", verify=True, **GRID)
    assert server.tree("there") == tree(local["mcore"])
    transcoder.mcore2hf("s3://bucket/there", "s3://bucket/back")
    assert server.tree("back") == tree(EXAMPLE)
    transcoder.reshard("s3://bucket/there", "s3://bucket/other", iteration=0, layout="per-layer")
    assert server.tree("other") == tree(local["again"])


@pytest.mark.slow
def test_what_reads_checkpoints_reads_them_in_a_bucket(server: Server, local: dict[str, Path]) -> None:
    server.put(local["mcore"], "there")
    transcoder.mcore2hf("s3://bucket/there", "s3://bucket/read-back", verify=True)
    transcoder.reshard("s3://bucket/there", "s3://bucket/read", iteration=0, layout="per-layer", verify=True)
    assert reading.check("s3://bucket/read")["checked"]["digests"] > 10
    assert reading.verify("s3://bucket/read-back", "s3://bucket/read")["differences"] == []
    assert reading.inspect("s3://bucket/there")["keys"] == reading.inspect(local["mcore"])["keys"]
    assert transcoder.plan("s3://bucket/hf", tp=2).report["tensors"] == transcoder.plan(EXAMPLE, tp=2).report["tensors"]


@pytest.mark.slow
def test_one_side_in_a_bucket_gives_the_same_bytes(server: Server, local: dict[str, Path], tmp_path: Path) -> None:
    transcoder.hf2mcore("s3://bucket/hf", tmp_path / "mcore", **GRID)
    assert tree(tmp_path / "mcore") == tree(local["mcore"])
    transcoder.hf2mcore(EXAMPLE.resolve().as_uri(), "s3://bucket/from-disk", checksums="sha256", **GRID)
    transcoder.hf2mcore(EXAMPLE, tmp_path / "sums", checksums="sha256", **GRID)
    assert server.tree("from-disk") == tree(tmp_path / "sums")
    transcoder.mcore2hf("s3://bucket/from-disk", tmp_path / "hf")
    assert tree(tmp_path / "hf") == tree(EXAMPLE)


@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf", pytest.param("reshard", marks=pytest.mark.slow)])
def test_every_byte_of_the_source_is_fetched_once(
    server: Server, local: dict[str, Path], tmp_path: Path, command: str
) -> None:
    options = GRID if command == "hf2mcore" else {}
    source = server.put(EXAMPLE if command == "hf2mcore" else local["mcore"], f"once-{command}")
    server.quiet()
    getattr(transcoder, command)(source, tmp_path / "out", **options)
    ranges = sorted(row for row in server.gate.ranges() if row[0].endswith((".safetensors", ".distcp")))
    twice = [(one, two) for one, two in pairwise(ranges) if one[0] == two[0] and one[2] > two[1]]
    blob = 0 if command == "hf2mcore" else 1  # nobody needs the object without content
    sizes = {path.name: path.stat().st_size for path in (EXAMPLE if not blob else local["mcore"]).rglob("*.*")}
    total = sum(size for name, size in sizes.items() if name.endswith((".safetensors", ".distcp")))
    assert twice == []
    assert total - 2000 * blob <= sum(stop - start for _, start, stop in ranges) <= total


def test_parts_are_sent_as_they_fill_and_the_commit_comes_last(
    server: Server, local: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART", 64 << 10)
    monkeypatch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
    transcoder.hf2mcore("s3://bucket/hf", "s3://bucket/parts", **GRID)
    assert server.tree("parts") == tree(local["mcore"])
    assert server.gate.parts() > 25
    written = [path.partition("?")[0] for method, path, _ in server.gate.asked if method in ("PUT", "POST")]
    assert written[-1] == "/bucket/parts/iter_0000000/metadata.json"
    assert written[-2] == "/bucket/parts/iter_0000000/.metadata"
    server.quiet()
    transcoder.mcore2hf("s3://bucket/parts", "s3://bucket/parts-back")
    assert server.tree("parts-back") == tree(EXAMPLE)
    written = [path.partition("?")[0] for method, path, _ in server.gate.asked if method in ("PUT", "POST")]
    assert written[-1] == "/bucket/parts-back/model.safetensors.index.json"


@pytest.mark.parametrize("fault", ["cut", *(pytest.param(x, marks=pytest.mark.slow) for x in ("429", "500", "503"))])
def test_a_busy_store_and_lost_connections_do_no_harm(server: Server, local: dict[str, Path], fault: str) -> None:
    seen = Counter[tuple[str, str, str]]()

    def every_other(method: str, path: str, place: str) -> str:
        seen[method, path, place] += 1
        useful = method == "GET" or fault != "cut"
        return fault if useful and seen[method, path, place] == 1 and len(seen) % 2 else ""

    server.gate.fault = every_other
    name = f"busy-{fault}"
    transcoder.hf2mcore("s3://bucket/hf", f"s3://bucket/{name}", **GRID)
    transcoder.mcore2hf(f"s3://bucket/{name}", f"s3://bucket/{name}-back")
    server.quiet()
    assert server.tree(name) == tree(local["mcore"])
    assert server.tree(f"{name}-back") == tree(EXAMPLE)
    assert sum(count > 1 for count in seen.values()) > 10


def test_a_store_that_stays_busy_is_lost_and_the_run_goes_on_later(server: Server, local: dict[str, Path]) -> None:
    server.gate.fault = lambda method, path, place: "503" if method == "GET" and "00003" in path and place else ""
    with pytest.raises(RemoteError, match="the object store is lost") as caught:
        transcoder.hf2mcore("s3://bucket/hf", "s3://bucket/lost", **GRID)
    assert (caught.value.exit_code, caught.value.kind) == (4, "lost-remote")
    server.quiet()
    transcoder.hf2mcore("s3://bucket/hf", "s3://bucket/lost", resume=True, **GRID)
    assert server.tree("lost") == tree(local["mcore"])


def test_an_object_that_changes_meanwhile_is_an_error_and_nothing_stays(server: Server) -> None:
    source = server.put(EXAMPLE, "changing")
    shard = "changing/model-00002-of-00003.safetensors"

    def change(method: str, path: str, place: str) -> str:
        if method == "PUT" and "changed.partial/journal" in path:
            server.gate.fault = lambda *request: ""
            body = (EXAMPLE / "model-00002-of-00003.safetensors").read_bytes()
            server.client.put_object(Bucket="bucket", Key=shard, Body=body[:-1] + bytes([body[-1] ^ 1]))
        return ""

    server.gate.fault = change
    with pytest.raises(InputError, match="the source changed during the run"):
        transcoder.hf2mcore(source, "s3://bucket/changed", **GRID)
    assert server.tree("changed") == {}


def test_a_destination_in_use_is_refused_and_overwriting_replaces_one_iteration(
    server: Server, local: dict[str, Path]
) -> None:
    transcoder.hf2mcore(EXAMPLE, "s3://bucket/used", tp=4, iteration=0)
    server.client.put_object(Bucket="bucket", Key="used/iter_0000009/foreign", Body=b"stays")
    with pytest.raises(OutputError, match="exists and is not empty"):
        transcoder.hf2mcore(EXAMPLE, "s3://bucket/used", **GRID)
    transcoder.hf2mcore(EXAMPLE, "s3://bucket/used", overwrite=True, tp=1, iteration=0)
    found = server.tree("used")
    assert found.pop("iter_0000009/foreign") == b"stays"
    transcoder.hf2mcore(EXAMPLE, "s3://bucket/fresh", tp=1, iteration=0)
    assert found == server.tree("fresh")


@pytest.mark.parametrize("side", ["source", "destination"])
@pytest.mark.parametrize(
    ("answer", "says"),
    [
        ("NoSuchBucket", "nobody"),
        ("SignatureDoesNotMatch", "AWS_SECRET_ACCESS_KEY"),
        ("AccessDenied", "permission"),
    ],
)
def test_what_a_store_refuses_is_one_clear_error(
    server: Server, tmp_path: Path, side: str, answer: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transcoder.remote import s3

    if answer != "NoSuchBucket":
        monkeypatch.setattr(s3.S3, "_call", _answering(answer))
    url = "s3://nobody-has-this/hf" if answer == "NoSuchBucket" else "s3://bucket/x"
    with pytest.raises((RemoteError, OutputError)) as caught:
        transcoder.hf2mcore(*((url, tmp_path / "x") if side == "source" else (EXAMPLE, url)), **GRID)
    assert caught.value.exit_code == (3 if side == "source" else 4)
    assert says in str(caught.value) and url.rpartition("/")[0] in str(caught.value)
    assert "a-secret-key" not in str(caught.value) and len(caught.value.problems) == 1


def _answering(code: str) -> object:
    from transcoder.remote import s3

    def call(self: s3.S3, name: str, **arguments: object) -> dict[str, object]:
        raise s3._refused({"Error": {"Code": code, "Message": "no"}, "ResponseMetadata": {"HTTPStatusCode": 403}})

    return call


@pytest.mark.parametrize("url", ["ftp://host/x", "s3://", "hf://only-one", "file://elsewhere/x", "s3://a/../b"])
def test_urls_that_name_nothing_are_wrong_usage(url: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        transcoder.hf2mcore(url, tmp_path / "x")


def test_too_little_memory_for_a_grid_is_told_before_anything_is_sent(server: Server) -> None:
    with pytest.raises(UsageError, match=r"give --memory \d+MiB or more"):
        transcoder.hf2mcore(EXAMPLE, "s3://bucket/large", tp=4, memory="48MiB")
    assert server.tree("large") == {}


def test_a_missing_prefix_is_not_found(server: Server, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such directory") as caught:
        transcoder.hf2mcore("s3://bucket/nothing-here", tmp_path / "x")
    assert caught.value.exit_code == 3


def test_what_stores_cannot_do_is_wrong_usage(server: Server, local: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no links"):
        transcoder.reshard(local["mcore"], "s3://bucket/linked", link=True)
    with pytest.raises(UsageError, match="writes to a directory"):
        transcoder.roundtrip(EXAMPLE, "s3://bucket/round")
    with pytest.raises(UsageError, match="lie inside one another"):
        transcoder.hf2mcore("s3://bucket/hf", "s3://bucket/hf/inside")
    assert transcoder.roundtrip("s3://bucket/hf")["tensors"] == 39


def test_a_checkpoint_without_its_commit_is_no_checkpoint(server: Server, local: dict[str, Path]) -> None:
    url = server.put(local["mcore"], "uncommitted")
    server.client.delete_object(Bucket="bucket", Key="uncommitted/iter_0000000/metadata.json")
    with pytest.raises(InputError, match="has not ended"):
        reading.inspect(url)


def test_bands_go_in_the_order_of_the_files() -> None:
    plan = transcoder.planning.plan_hf2mcore(EXAMPLE, tp=2, pp=2)
    offsets: dict[str, int] = {}
    for key, box in plan.order():
        chunk = next(chunk for chunk in plan.placement.catalog[key].chunks if chunk.box == box)
        assert chunk.offset > offsets.get(chunk.file, -1)
        offsets[chunk.file] = chunk.offset
    assert len(offsets) == 8
