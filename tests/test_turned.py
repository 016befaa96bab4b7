"""Tensors that Megatron holds transposed move matrix by matrix: same bytes, few writes, and runs that can go on."""

from __future__ import annotations

from collections import Counter
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import names, tree
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import Case, Memory, cases, model_of, shape_of, spec_of, tilings
from zoo import made

import transcoder
from transcoder.atlas import Atlas
from transcoder.engine import bands, scatter
from transcoder.formats.torch_dist_writer import TorchDistWriter
from transcoder.moves import Run
from transcoder.spec import DTYPES, Chunk
from transcoder.turned import Reader, collected, strokes

pytestmark = pytest.mark.usefixtures("loops")
PROPERTY = settings(deadline=None, max_examples=100, derandomize=True)
INT32 = DTYPES["int32"]
GRID = {"tp": 2, "ep": 2, "etp": 1, "workers": 1}
BANDS = pytest.mark.parametrize("band", [1024, 4000])  # 4000 bytes: no matrix ends where a leaf does, but for the last
EXPERTS = "experts.linear_fc"


class EnoughError(Exception):
    """Raised by a listener to end a run."""


def atlas_of(case: Case, data: st.DataObject) -> Any:
    """A case's model, bound to arbitrary chunks."""
    model = model_of(f"m {case.mcore}", tuple(f"t{n} {text}" for n, text in enumerate(case.hf)), case.sizes)
    extents = shape_of(case.mcore, case.sizes)
    return model, Atlas({"m": spec_of("m", extents, data.draw(tilings(extents)))})


@PROPERTY
@given(cases(), st.integers(1, 200), st.data())
def test_any_layout_is_collected_in_order_and_every_byte_fetched_once(
    case: Case, band: int, data: st.DataObject
) -> None:
    model, atlas = atlas_of(case, data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transcoder.engine.BAND", band)
        for tensor in model.hf.values():
            values = np.arange(1, prod(tensor.shape) + 1, dtype=np.uint32)
            memory, fetched = Memory(), Counter[tuple[Any, int]]()
            scatter(atlas, tensor, 0, values, memory.sink)

            def fetch(
                key: str, chunk: Chunk, start: int, count: int, memory: Memory = memory, seen: Any = fetched
            ) -> Any:
                seen.update((chunk.box, byte) for byte in range(start, start + count))
                return memory.fetch(key, chunk, start, count)

            found: list[int] = []
            for stroke in strokes(atlas, tensor, bands(tensor.shape, INT32)):
                for first, part in collected(atlas, tensor, stroke, INT32, fetch, 4 * stroke[0], 4):
                    assert first == len(found)
                    found += part.tolist()
            assert found == values.tolist()
            assert len(fetched) == sum(fetched.values()) == 4 * len(values)
            reader = Reader(atlas, tensor, INT32, memory.fetch)
            edges = bands(tensor.shape, INT32)
            assert [int(v) for edge in edges for v in reader.read(*edge)] == values.tolist()


@PROPERTY
@given(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 60)), min_size=1, max_size=3), st.integers(1, 70))
def test_parts_of_a_run_are_the_run(axes: list[tuple[int, int]], limit: int) -> None:
    shape, steps = zip(*axes, strict=True)
    run = Run(5, prod(shape), 7, shape, steps)
    parts = list(run.parts(limit))
    assert [part.chunk for part in parts] == [5 + sum(p.count for p in parts[:n]) for n in range(len(parts))]
    assert sum(part.count for part in parts) == run.count == sum(prod(part.shape) for part in parts)
    assert [place for part in parts for place in _places(part)] == _places(run)
    assert all(part.count <= max(limit, run.count // shape[0]) for part in parts)


def _places(run: Run) -> list[int]:
    return [run.hf + sum(i * step for i, step in zip(at, run.hf_steps, strict=True)) for at in np.ndindex(run.shape)]


def test_transposed_matrices_move_whole_and_others_band_by_band(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transcoder.engine.BAND", 64)
    case = Case("e h f", ("e f h",), {"e": 3, "f": 8, "h": 4})
    for mcore, expected in (
        ("e h f", [(0, 32), (32, 64), (64, 96)]),
        ("e f h", [(n, n + 16) for n in range(0, 96, 16)]),
    ):
        model = model_of(f"m {mcore}", ("t e f h",), case.sizes)
        extents = shape_of(mcore, case.sizes)
        atlas = Atlas({"m": spec_of("m", extents, (tuple((0, size) for size in extents),))})
        assert strokes(atlas, model.hf["t"], bands(model.hf["t"].shape, INT32)) == expected


def payloads(folder: Path) -> dict[str, bytes]:
    """The files of weights."""
    return {path.name: path.read_bytes() for path in folder.rglob("*") if path.suffix in (".distcp", ".safetensors")}


@BANDS
def test_experts_are_the_same_in_few_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band: int) -> None:
    source, counts = made("gpt-oss"), Counter[str]()
    transcoder.hf2mcore(source, tmp_path / "whole", **GRID)
    write = TorchDistWriter.write

    def counted(self: Any, key: str, *others: Any) -> int:
        counts[key] += EXPERTS in key and "weight" in key
        return write(self, key, *others)

    monkeypatch.setattr("transcoder.engine.BAND", band)
    monkeypatch.setattr(TorchDistWriter, "write", counted)
    transcoder.hf2mcore(source, tmp_path / "parts", **GRID)
    assert payloads(tmp_path / "parts") == payloads(tmp_path / "whole")
    assert 0 < max(counts.values()) <= 2 * 4 * 3  # gate and up of 4 experts in 3 layers
    transcoder.mcore2hf(tmp_path / "parts", tmp_path / "back")
    assert payloads(tmp_path / "back") == payloads(source)
    transcoder.verify(source, tmp_path / "parts")  # raises where bits differ
    transcoder.roundtrip(source, **GRID)


@BANDS
@pytest.mark.parametrize("stop", [6, 9, 12, 20])
def test_a_run_that_ends_between_or_within_matrices_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, band: int, stop: int
) -> None:
    monkeypatch.setattr("transcoder.engine.BAND", band)
    source = made("gpt-oss")
    transcoder.hf2mcore(source, tmp_path / "mcore", **GRID)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "hf", workers=1)
    for name, convert, start in (
        ("mcore", transcoder.hf2mcore, source),
        ("hf", transcoder.mcore2hf, tmp_path / "mcore"),
    ):
        options = GRID if name == "mcore" else {"workers": 1}
        seen: list[object] = []

        def listen(progress: object, seen: list[object] = seen) -> None:
            seen.append(progress)
            if len(seen) == stop:
                raise EnoughError

        with pytest.raises(EnoughError):
            convert(start, tmp_path / "new", progress=listen, **options)
        convert(start, tmp_path / "new", resume=True, **options)
        assert tree(tmp_path / "new") == tree(tmp_path / name)
        assert "new.partial" not in names(tmp_path)
        (tmp_path / "new").rename(tmp_path / f"again-{name}")
