"""Valid headers, indexes, plans and manifests, mutated: they are read as naive readers do, or refused.

`naive_formats` has the naive readers. The bounded runs belong to every test run; the long ones are marked slow.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import naive_formats as naive
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_strategies import NAMES, RANDOM, pickled_plan, plans

from fuzz import jsons, opcodes, oracles, repairs
from transcoder import manifest
from transcoder.errors import InputError
from transcoder.formats.pickles import loads
from transcoder.formats.safetensors import read_index, read_shard
from transcoder.formats.torch_dist import METADATA_NAMES, open_torch_dist

UNTIMED: dict[str, Any] = {"deadline": None, "database": None, "suppress_health_check": [*HealthCheck]}
SHAPES = st.lists(st.integers(0, 3), max_size=3)


def refused_or(read: Callable[[], Any]) -> Any:
    """What a reader gives, None when it refuses the input with an error of ours that can be printed."""
    try:
        return read()
    except InputError as error:
        assert str(error).replace("\n", "").isprintable()
        return None


def bytes_edited(rng: Random, data: bytes) -> bytes:
    """One to three bytes replaced, removed or inserted."""
    found = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, width = rng.randrange(len(found)), rng.choice((0, 1, 1))
        found[at : at + width] = bytes(rng.randrange(256) for _ in range(rng.choice((0, 1, 1))))
    return bytes(found)


@st.composite
def safetensors_files(draw: st.DrawFn) -> bytes:
    """A valid file of a few tensors, as it is or with one to three edits of its header, lengths fitted again."""
    tensors = draw(st.dictionaries(NAMES, st.tuples(st.sampled_from([*naive.SIZES]), SHAPES), max_size=4))
    table: dict[str, Any] = {"__metadata__": {"format": "pt"}} if draw(st.booleans()) else {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        start, end = end, end + naive.SIZES[dtype] * naive.prod(shape)
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(table, ensure_ascii=draw(st.booleans())).encode()
    data, rng = len(header).to_bytes(8, "little") + header + bytes(end), draw(RANDOM)
    for _ in range(draw(st.integers(0, 3))):
        data = _edited(rng, data, repairs.edited_safetensors)
    return data


def _edited(rng: Random, data: bytes, edit: Callable[[Random, bytes], bytes]) -> bytes:
    """An edit of the structure where there is still one, or of bytes."""
    try:
        return edit(rng, data) if rng.random() < 0.7 else bytes_edited(rng, data)
    except (ValueError, RecursionError):
        return bytes_edited(rng, data)


def check_safetensors(data: bytes, place: Path) -> bool:
    (place / "x.safetensors").write_bytes(data)
    shard = refused_or(lambda: read_shard(place / "x.safetensors"))
    found = shard and {
        t.name: (t.dtype.safetensors, t.shape, data[t.chunks[0].offset :][: t.chunks[0].nbytes]) for t in shard.tensors
    }
    assert found == naive.safetensors(data)
    return shard is not None


@st.composite
def indexes(draw: st.DrawFn) -> bytes:
    """A valid index, as it is or edited."""
    weights = draw(st.dictionaries(NAMES, st.sampled_from(["a.safetensors", "b.safetensors", ".x", "é"]), min_size=1))
    table = {"metadata": {"total_size": 8}, "weight_map": weights}
    data, rng = json.dumps(table, ensure_ascii=draw(st.booleans())).encode(), draw(RANDOM)
    for _ in range(draw(st.integers(0, 3))):
        try:
            data = (
                jsons.mutate(rng, data, ("weight_map", "..", "a/b")) if rng.random() < 0.7 else bytes_edited(rng, data)
            )
        except (ValueError, RecursionError):
            data = bytes_edited(rng, data)
    return data


def check_index(data: bytes, place: Path) -> bool:
    (place / "index.json").write_bytes(data)
    found = refused_or(lambda: read_index(place / "index.json"))
    assert found == naive.index(data)
    return found is not None


def check_plan(plan: naive.Plan, place: Path) -> bool:
    (place / ".metadata").write_bytes(pickled_plan(plan))
    store = refused_or(lambda: open_torch_dist(place))
    read = store and store.tensors.items()
    found = read and {key: (dtype.name, shape, tuple(map(_chunk, chunks))) for key, (dtype, shape, chunks) in read}
    assert found == naive.plan(plan)
    return store is not None


def _chunk(chunk: Any) -> tuple[Any, ...]:
    box, item = chunk
    return tuple(a for a, _ in box), tuple(b - a for a, b in box), (item.file, item.offset, item.length)


def pickles() -> st.SearchStrategy[bytes]:
    """`.metadata` of valid plans with an opcode or a byte changed."""
    return st.builds(_pickle_edited, plans(), RANDOM, st.booleans())


def _pickle_edited(plan: naive.Plan, rng: Random, whole: bool) -> bytes:
    data = pickled_plan(plan)
    return opcodes.mutate(rng, data) if whole else bytes_edited(rng, data)


def check_pickle(data: bytes, place: Path) -> bool:
    value = refused_or(lambda: (loads(data, METADATA_NAMES, ".metadata"),))
    if value is not None:
        oracles.pickled(data, value[0])
    (place / ".metadata").write_bytes(data)
    store = refused_or(lambda: open_torch_dist(place))
    assert store is None or value is not None
    return value is not None


@st.composite
def manifests(draw: st.DrawFn) -> bytes:
    """A valid manifest, as it is, edited and sealed again, or with bytes changed."""
    names = draw(st.lists(NAMES.filter(lambda name: not set(name) & set("/\\:\0.")), unique=True, max_size=4))
    files = [{"name": name, "size": size, "digest": "crc32:00000000"} for size, name in enumerate(names)]
    row = {
        "name": "w",
        "dtype": "BF16",
        "shape": [2, 0],
        "tree": f"xxh3-128/4MiB:{'0' * 32}",
        "exact": True,
        "from": ["w"],
    }
    table = {"format": "transcode-manifest", "version": 1, "folder": "iter_0000000", "files": files, "tensors": [row]}
    table |= {"source": {"kind": "safetensors", "files": files[:1]}, "tool": "1", "recipe": "llama", "variants": {}}
    table |= {"direction": "hf2mcore", "layout": "stacked", "plan": ""}
    table |= {"restore": {"headers": dict.fromkeys(names[:1], ""), "index": "", "vocab_size": 8, "dtype": "bfloat16"}}
    data, rng, kind = bytes(manifest.emit(table)), draw(RANDOM), draw(st.integers(0, 2))
    for _ in range(kind and draw(st.integers(1, 2))):
        data = repairs.digest(jsons.mutate(rng, data, repairs.WORDS)) if kind == 1 else bytes_edited(rng, data)
    return data


def check_manifest(data: bytes, place: Path) -> bool:
    (place / manifest.NAME).write_bytes(data)
    found = refused_or(lambda: manifest.read(place))
    assert found is None or (found == json.loads(data) and naive.sealed(data))
    assert found is None or (found["format"], found["version"]) == ("transcode-manifest", 1)
    return found is not None


PARSERS: dict[str, tuple[st.SearchStrategy[Any], Callable[[Any, Path], bool]]] = {
    "safetensors": (safetensors_files(), check_safetensors),
    "index": (indexes(), check_index),
    "plan": (plans(), check_plan),
    "pickle": (pickles(), check_pickle),
    "manifest": (manifests(), check_manifest),
}


def run(name: str, count: int, repeatable: bool) -> None:
    """Check `count` examples; both outcomes must occur."""
    inputs, check = PARSERS[name]
    outcomes = set()

    @settings(max_examples=count, derandomize=repeatable, **UNTIMED)
    @given(inputs)
    def once(value: Any) -> None:
        outcomes.add(check(value, place))

    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        once()
    assert outcomes == {True, False}


@pytest.mark.parametrize("name", PARSERS)
def test_mutated_input_is_read_as_the_naive_reader_does_or_refused(name):
    run(name, 200, repeatable=True)


@pytest.mark.slow
@pytest.mark.exhaustive
@pytest.mark.parametrize("name", PARSERS)
def test_thousands_of_mutated_inputs_are_read_as_the_naive_reader_does_or_refused(name):
    run(name, 2500, repeatable=False)
