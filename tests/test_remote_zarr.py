"""Zarr arrays in a bucket: an object for every chunk file; tensorstore's own S3 driver is the witness."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
from command_line import EXAMPLE, transcode, tree
from remote_server import Server, serving
from test_remote_runs import SMALL, stopped_after

import transcoder
from transcoder import engine, openparts
from transcoder.errors import OutputError, UsageError
from transcoder.planning import plan_hf2mcore
from transcoder.remote import store, uploads
from transcoder.remote.outbox import Outbox

GRID = {"tp": 2, "pp": 2, "iteration": 0}
FORMS = ("zarr", "zarr3")
FOLDER = "iter_0000000"


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server that takes small parts, with the example model at hf/."""
    with pytest.MonkeyPatch.context() as patch, serving() as found:
        patch.setattr(store, "FIRST_PAUSE", 0.01)
        patch.setattr("moto.s3.models.S3_UPLOAD_PART_MIN_SIZE", 1)
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
    for form in FORMS:
        transcoder.hf2mcore(EXAMPLE, root / form, format=form, **GRID)
    return {form: root / form for form in FORMS}


def _through_s3(server: Server, form: str, path: str) -> Any:
    """An array as tensorstore's own S3 driver finds it."""
    place = {"driver": "s3", "bucket": "bucket", "path": path, "endpoint": server.environment["AWS_ENDPOINT_URL"]}
    place |= {"aws_region": "us-east-1", "aws_credentials": {"type": "environment"}}
    return tensorstore.open({"driver": form, "kvstore": place}, read=True).result()


@pytest.mark.parametrize("form", ["zarr", pytest.param("zarr3", marks=pytest.mark.slow)])
def test_arrays_in_a_bucket_are_those_on_a_disk_and_tensorstore_reads_them(
    server: Server, local: dict[str, Path], form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART", 64 << 10)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    transcoder.hf2mcore("s3://bucket/hf", f"s3://bucket/{form}", format=form, **GRID)
    assert server.tree(form) == tree(local[form])
    assert server.gate.parts() >= 8, "objects above a part go up in parts"
    written = [path.partition("?")[0] for method, path, _ in server.gate.asked if method in ("PUT", "POST")]
    assert written[-1] == f"/bucket/{form}/{FOLDER}/metadata.json"
    document = {"zarr": ".zarray", "zarr3": "zarr.json"}[form]
    assert all(name.endswith(f"/{document}") for name in written[-5:-1]), "descriptions come after the payloads"
    keys = [path.parent for path in (local[form] / FOLDER).glob(f"*/{document}")]
    assert len(keys) > 5
    for key in keys:
        here = tensorstore.open({"driver": form, "kvstore": {"driver": "file", "path": f"{key}/"}}, read=True).result()
        there = _through_s3(server, form, f"{form}/{FOLDER}/{key.name}/")
        assert np.array_equal(np.asarray(there).view(np.uint8), np.asarray(here).view(np.uint8))
    transcoder.mcore2hf(f"s3://bucket/{form}", f"s3://bucket/{form}-back")
    assert server.tree(f"{form}-back") == tree(EXAMPLE)


def test_every_object_is_sent_once_small_ones_as_a_whole(server: Server, local: dict[str, Path]) -> None:
    transcoder.hf2mcore(EXAMPLE, "s3://bucket/once", format="zarr", **GRID)
    sent = [p.removeprefix("/bucket/once/").rstrip("?") for m, p, _ in server.gate.asked if m in ("PUT", "POST")]
    assert sorted(name for name in sent if ".partial" not in name) == sorted(tree(local["zarr"]))


@pytest.mark.slow
@pytest.mark.parametrize("one", FORMS)
def test_formats_change_between_buckets(server: Server, local: dict[str, Path], tmp_path: Path, one: str) -> None:
    two = {"zarr": "zarr3", "zarr3": "zarr"}[one]
    source = server.put(local[one], f"from-{one}")
    server.quiet()
    transcoder.reshard(source, f"s3://bucket/to-{two}", format=two, tp=4, iteration=0)
    ranges = [row for row in server.gate.ranges() if _is_payload(row[0])]
    assert len(set(ranges)) == len(ranges) > 10, "every range is fetched once"
    transcoder.reshard(local[one], tmp_path / two, format=two, tp=4, iteration=0)
    assert server.tree(f"to-{two}") == tree(tmp_path / two)


@pytest.mark.slow
def test_ranks_files_become_arrays_between_buckets_and_back(server: Server, tmp_path: Path) -> None:
    transcoder.hf2mcore("s3://bucket/hf", "s3://bucket/ranks", **GRID)
    transcoder.hf2mcore(EXAMPLE, tmp_path / "ranks", **GRID)
    for form in FORMS:
        transcoder.reshard("s3://bucket/ranks", f"s3://bucket/arrays-{form}", format=form, iteration=0, verify=True)
        transcoder.reshard(tmp_path / "ranks", tmp_path / form, format=form, iteration=0)
        assert server.tree(f"arrays-{form}") == tree(tmp_path / form)
        transcoder.reshard(f"s3://bucket/arrays-{form}", f"s3://bucket/ranks-{form}", iteration=0, tp=2, pp=2)
        payloads = {name for name in server.tree("ranks") if name.endswith(".distcp")}
        found = server.tree(f"ranks-{form}")
        assert {name: found[name] for name in payloads} == {n: server.tree("ranks")[n] for n in payloads}


@pytest.mark.slow
def test_a_new_checkpoint_replaces_arrays_of_another_grid(server: Server, local: dict[str, Path]) -> None:
    transcoder.hf2mcore(EXAMPLE, "s3://bucket/used", format="zarr", tp=4, iteration=0)
    server.client.put_object(Bucket="bucket", Key="used/iter_0000009/foreign", Body=b"stays")
    with pytest.raises(OutputError, match="exists and is not empty"):
        transcoder.hf2mcore(EXAMPLE, "s3://bucket/used", format="zarr", **GRID)
    transcoder.hf2mcore(EXAMPLE, "s3://bucket/used", format="zarr", overwrite=True, **GRID)
    found = server.tree("used")
    assert found.pop("iter_0000009/foreign") == b"stays"
    assert found == tree(local["zarr"])


@pytest.mark.parametrize("form", [pytest.param("zarr", marks=pytest.mark.slow), "zarr3"])
def test_a_killed_run_goes_on_and_sends_no_object_again(server: Server, local: dict[str, Path], form: str) -> None:
    line = ["hf2mcore", "s3://bucket/hf", f"s3://bucket/killed-{form}", "--format", form, "--iteration", "0"]
    line += ["--tp", "2", "--pp", "2"]
    assert stopped_after(server, line, 4)[0] == -9
    before = _payloads(server, form)
    server.quiet()
    done = transcode(*line, "--resume", driver=SMALL)
    assert done.code == 0, done.err
    found, wanted = server.tree(f"killed-{form}"), tree(local[form])
    for table in (found, wanted):
        del table[f"{FOLDER}/transcode-manifest.json"]  # its digests are of bands, which are smaller here
    assert found == wanted
    after = _payloads(server, form)
    sizes = [len(data) for name, data in tree(local[form]).items() if _is_payload(name)]
    needed = sum(-(-size // 65536) for size in sizes)
    assert after and needed <= len(before) + len(after) <= needed + 4  # what was on its way when it was killed


def _payloads(server: Server, form: str) -> list[str]:
    """Every part and every object that was sent of payloads."""
    puts = [path for method, path, _ in server.gate.asked if method == "PUT"]
    return [path for path in puts if f"killed-{form}/" in path and _is_payload(path.partition("?")[0])]


def _is_payload(name: str) -> bool:
    return name.rpartition("/")[2].replace(".", "").isdigit()


@pytest.mark.parametrize("form", [pytest.param("zarr", marks=pytest.mark.slow), "zarr3"])
def test_the_parts_that_are_open_at_a_time_are_known_from_the_plan(
    server: Server, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(uploads, "PART", 16 << 10)
    monkeypatch.setattr(engine, "BAND", 8 << 10)
    taken = [0]
    take = Outbox.take

    def noting(self: Outbox, size: int) -> None:
        take(self, size)
        taken.append(self._taken)

    monkeypatch.setattr(Outbox, "take", noting)
    plan = plan_hf2mcore(EXAMPLE, format=form, **GRID)
    expected = openparts.unfinished(plan)(1)
    transcoder.hf2mcore(EXAMPLE, f"s3://bucket/open-{form}", format=form, workers=1, memory="17MiB", **GRID)
    assert expected / 4 < max(taken) <= expected < sum(plan.placement.sizes.values()) / 4


def test_too_little_memory_for_open_chunks_is_told_before_anything_is_sent(server: Server) -> None:
    with pytest.raises(UsageError, match="give --memory 17MiB or more"):
        transcoder.hf2mcore(EXAMPLE, "s3://bucket/large", format="zarr", memory="16MiB", **GRID)
    assert server.tree("large") == {}


@pytest.mark.parametrize("form", FORMS)
def test_a_store_without_upload_ids_takes_arrays_too(form: str, tmp_path: Path) -> None:
    transcoder.hf2mcore(EXAMPLE, f"memory://{form}/arrays", format=form, verify=True, checksums="sha256", **GRID)
    transcoder.hf2mcore(EXAMPLE, f"memory://{form}/arrays", format=form, overwrite=True, **GRID)
    transcoder.mcore2hf(f"memory://{form}/arrays", tmp_path / "hf")
    assert tree(tmp_path / "hf") == tree(EXAMPLE)
