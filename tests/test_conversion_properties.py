"""Whole conversions of small random models: the same bytes whatever surrounds a run, and back again without a trace."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import spec_of, tilings
from random_models import LAYERS, SOURCES, Source, tensors_of, write_model

import transcoder
from transcoder.api import plan_hf2mcore
from transcoder.atlas import Atlas
from transcoder.checks import check_coverage
from transcoder.errors import InputError
from transcoder.formats.torch_dist import check_tiling
from transcoder.spec import Box

ROOT = Path(__file__).parent.parent
MANIFEST = "transcode-manifest.json"
PROPERTY = settings(deadline=None, max_examples=15, derandomize=True)
Tree = dict[str, bytes | str]
Damage = Callable[[list[Box], int], list[Box]]


@dataclass(frozen=True)
class Grid:
    """Options of an import."""

    tp: int = 1
    pp: int = 1
    layout: str = ""
    divisor: int = 128

    def options(self) -> dict[str, Any]:
        """As keyword arguments."""
        return {"tp": self.tp, "pp": self.pp, "layout": self.layout, "make_vocab_size_divisible_by": self.divisor}


GRIDS = st.builds(
    Grid,
    tp=st.sampled_from([1, 2, 3, 6]),
    pp=st.integers(1, LAYERS),
    layout=st.sampled_from(["", "stacked", "per-layer", "singleton"]),
    divisor=st.sampled_from([1, 8, 128]),
)


def files_of(folder: Path) -> Tree:
    """Every file below a folder with its bytes, every link with its target, every empty folder."""
    found: Tree = {}
    for top, folders, names in os.walk(folder):
        for path in (Path(top, name) for name in folders + names):
            if path.is_symlink():
                found[str(path.relative_to(folder))] = str(path.readlink())
            elif path.is_file():
                found[str(path.relative_to(folder))] = path.read_bytes()
            else:
                found[str(path.relative_to(folder))] = "folder"
    return found


def payloads(tree: Tree) -> Tree:
    """What Megatron loads of a checkpoint, and the side files; not the manifest."""
    return {name: data for name, data in tree.items() if Path(name).name != MANIFEST}


def imported(src: Path, dst: Path, grid: Grid, **options: Any) -> Tree:
    """The files of a checkpoint made from `src`."""
    transcoder.hf2mcore(src, dst, **grid.options(), **{"sync": False, "workers": 1, **options})
    return files_of(dst)


@pytest.fixture(scope="module", autouse=True)
def folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """New empty folders for `fresh`, gone when the module is done."""
    FOLDERS.append(tmp_path_factory.mktemp("conversions"))
    yield
    shutil.rmtree(FOLDERS.pop())


FOLDERS: list[Path] = []


def fresh() -> Path:
    """A folder that nobody has used."""
    folder = FOLDERS[-1] / f"{len(list(FOLDERS[-1].iterdir()))}"
    folder.mkdir()
    return folder


@PROPERTY
@given(SOURCES, GRIDS)
def test_export_after_import_is_the_identity_on_files(source: Source, grid: Grid) -> None:
    work = fresh()
    src = write_model(work / "model", source)
    imported(src, work / "mcore", grid)
    transcoder.mcore2hf(work / "mcore", work / "back", sync=False, workers=2)
    assert files_of(work / "back") == files_of(src)


@PROPERTY
@given(SOURCES, GRIDS, st.sampled_from([1, 2000, 10**9]))
def test_without_a_manifest_the_export_still_holds_every_tensor(source: Source, grid: Grid, shard: int) -> None:
    work = fresh()
    src = write_model(work / "model", source)
    imported(src, work / "mcore", grid)
    (manifest,) = (work / "mcore").glob(f"iter_*/{MANIFEST}")
    manifest.unlink()
    transcoder.mcore2hf(work / "mcore", work / "back", sync=False, max_shard_size=shard)
    assert tensors_of(work / "back") == tensors_of(src)


@settings(PROPERTY, max_examples=5)
@given(SOURCES, GRIDS)
def test_the_number_of_workers_changes_no_byte(source: Source, grid: Grid) -> None:
    work = fresh()
    src = write_model(work / "model", source)
    first = imported(src, work / "1", grid, workers=1)
    assert all(imported(src, work / str(n), grid, workers=n) == first for n in (2, 3, 4))
    for n in (1, 2, 3, 4):
        transcoder.mcore2hf(work / "1", work / f"back{n}", sync=False, workers=n)
        assert files_of(work / f"back{n}") == files_of(src)


@PROPERTY
@given(SOURCES, GRIDS, st.sampled_from([1, 3, 49, 97, 1001]))
def test_the_size_of_a_band_changes_no_payload(source: Source, grid: Grid, band: int) -> None:
    work = fresh()
    src = write_model(work / "model", source)
    whole = imported(src, work / "whole", grid)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcoder.engine.BAND", band)
        parts = imported(src, work / "parts", grid, workers=2)
        transcoder.mcore2hf(work / "parts", work / "back", sync=False)
    assert payloads(parts) == payloads(whole)
    assert files_of(work / "back") == files_of(src)


@settings(PROPERTY, max_examples=5)
@given(SOURCES, GRIDS)
def test_places_of_source_and_destination_leave_no_trace(source: Source, grid: Grid) -> None:
    work = fresh()
    src = write_model(work / "model", source)
    first = imported(src, work / "mcore", grid)
    moved = work / "elsewhere" / "renamed model é"
    for path in sorted((path for path in src.rglob("*") if path.is_file()), reverse=True):
        (moved / path.relative_to(src)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, moved / path.relative_to(src))
    (work / "deep" / "er").mkdir(parents=True)
    assert imported(moved, work / "deep" / "er" / "iter_0000009 ü", grid) == first
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        assert imported(Path("model"), Path("relative"), grid) == first


def test_clock_host_and_user_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    work = fresh()
    src = write_model(work / "model", Source())
    first = imported(src, work / "1", Grid(tp=2, pp=2))
    for path in [src, *src.rglob("*")]:
        os.utime(path, (1, 1))
    monkeypatch.setattr(time, "time", lambda: 4e9)
    monkeypatch.setattr(time, "time_ns", lambda: 4 * 10**18)
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    monkeypatch.setattr(os, "getpid", lambda: 1)
    for name in ("HOSTNAME", "USER", "LOGNAME", "HOME"):
        monkeypatch.setenv(name, "nobody")
    assert imported(src, work / "2", Grid(tp=2, pp=2)) == first


@pytest.mark.parametrize("other", [{"TZ": "Asia/Tokyo", "PYTHONHASHSEED": "1"}, {"LC_ALL": "C", "PYTHONHASHSEED": "2"}])
def test_another_process_writes_the_same_bytes(other: dict[str, str]) -> None:
    work = fresh()
    src = write_model(work / "model", replace(Source(), shards=3, tied=True))
    first = imported(src, work / "here", Grid(tp=3, pp=2))
    code = "import sys, transcoder; transcoder.hf2mcore(*sys.argv[1:3], tp=3, pp=2)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **other}
    arguments = [sys.executable, "-c", code, str(src), str(work / "there")]
    subprocess.run(arguments, env=environment, cwd=work, umask=0o077, check=True, timeout=60)
    assert files_of(work / "there") == first


def holed(boxes: list[Box], at: int) -> list[Box]:
    """Without one box."""
    return boxes[:at] + boxes[at + 1 :]


def doubled(boxes: list[Box], at: int) -> list[Box]:
    """With one box twice."""
    return [*boxes, boxes[at]]


def shrunk(boxes: list[Box], at: int) -> list[Box]:
    """With the last row of one box missing."""
    (start, stop), *rest = boxes[at]
    return [*holed(boxes, at), ((start, stop - 1), *rest)]


def overlapping(boxes: list[Box], at: int) -> list[Box]:
    """With the last row of one box in one more box."""
    (_, stop), *rest = boxes[at]
    return [*boxes, ((stop - 1, stop), *rest)]


def shifted(boxes: list[Box], at: int) -> list[Box]:
    """With one box a row further on: a hole and, unless it sticks out, an overlap of the same size."""
    (start, stop), *rest = boxes[at]
    return [*holed(boxes, at), ((start + 1, stop + 1), *rest)]


@settings(PROPERTY, max_examples=50)
@given(GRIDS, st.sampled_from([holed, doubled, shrunk, overlapping, shifted]), st.data())
def test_a_hole_or_an_overlap_is_refused(grid: Grid, damage: Damage, data: st.DataObject) -> None:
    plan = plan_hf2mcore(model(), **grid.options())
    check_coverage(plan.model, plan.atlas)
    catalog = dict(plan.atlas.catalog)
    name = data.draw(st.sampled_from(sorted(catalog)))
    boxes = [chunk.box for chunk in catalog[name].chunks]
    damaged = damage(boxes, data.draw(st.integers(0, len(boxes) - 1)))
    catalog[name] = spec_of(name, catalog[name].shape, tuple(damaged), plan.dtype.name)
    with pytest.raises(InputError):
        check_coverage(plan.model, Atlas(catalog))


@settings(PROPERTY, max_examples=100)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3).map(tuple), st.data())
def test_only_boxes_that_tile_a_stored_tensor_are_read(shape: tuple[int, ...], data: st.DataObject) -> None:
    boxes = list(data.draw(tilings(shape)))
    check_tiling("key", shape, boxes)
    damage = data.draw(st.sampled_from([holed, doubled, shrunk, overlapping, shifted]))
    with pytest.raises(InputError):
        check_tiling("key", shape, damage(boxes, data.draw(st.integers(0, len(boxes) - 1))))


def model() -> Path:
    """One model for tests that only plan."""
    folder = FOLDERS[-1] / "planned"
    return folder if folder.exists() else write_model(folder, Source())
