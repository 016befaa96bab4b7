"""Plans of torch_dist checkpoints as plain lists, valid or spoiled, and `.metadata` in the shape that torch writes."""

from __future__ import annotations

import copy
from random import Random
from typing import Any

from hypothesis import strategies as st
from naive_formats import Plan

from transcoder.formats.pickles import Global, Pairs, Record, dumps

EXTREMES = (-1, 0, 1, 2**31, 2**62 - 1, 2**62, 2**63, 2**64, 2**100)
PATHS = ("../x", "/x", "a/b", "a//b", "", ".", "a\\b", "a\0", "other.distcp")
DCP = "torch.distributed.checkpoint"
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
RANDOM = st.integers(0, 2**32).map(Random)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    """A valid plan of tensors cut into rows, as it is or with entries dropped, doubled, moved or made extreme."""
    tensors: dict[str, Any] = {}
    places: list[list[Any]] = []
    for key in draw(st.lists(NAMES.map("w.{}".format), min_size=1, max_size=3, unique=True)):
        shape = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
        cut = draw(st.integers(1, shape[0]))
        rows = [(0, cut), (cut, shape[0] - cut)] if cut < shape[0] else [(0, cut)]
        boxes = [[[start] + [0] * (len(shape) - 1), [size, *shape[1:]]] for start, size in rows]
        tensors[key] = draw(st.sampled_from(["bfloat16", "float32"])), shape, boxes
        places += [[key, list(box[0]), "__0_0.distcp", 100 * (len(places) + i), 100] for i, box in enumerate(boxes)]
    rng = draw(RANDOM)
    for _ in range(draw(st.integers(0, 2))):
        _spoil(rng, tensors, places)
    return tensors, places


def _spoil(rng: Random, tensors: dict[str, Any], places: list[list[Any]]) -> None:
    _, shape, boxes = tensors[rng.choice([*tensors])]
    numbers = [part for box in boxes for part in box] + [shape]
    at, row = rng.choice(numbers), rng.choice(places) if places else ["", [0], "", 0, 1]
    kind = rng.randrange(9)
    if kind == 0 and at:
        at[rng.randrange(len(at))] = rng.choice(EXTREMES)
    elif kind == 1 and at:
        at[rng.randrange(len(at))] += rng.choice((-1, 1))
    elif kind == 2:
        row[rng.choice((3, 4))] = rng.choice((-1, 1, 50, 101, 2**62, 2**63))
    elif kind == 3:
        row[2] = rng.choice(PATHS)
    elif kind == 4 and places:
        places.remove(row)
    elif kind == 5:
        boxes[:] = boxes[1:]
    elif kind == 6 and boxes:
        boxes.append(copy.deepcopy(boxes[0]))
    elif kind == 7:
        places.append(list(row))
    else:
        at[:] = at[1:] if rng.random() < 0.5 else [*at, 1]


def pickled_plan(plan: Plan) -> bytes:
    """`.metadata` in the shape that torch writes."""
    tensors, places = plan
    rows = [(key, _storage_of(*row)) for key, row in tensors.items()]
    items = [(_index_of(key, offsets), _info(*place)) for key, offsets, *place in places]
    fields = [("state_dict_metadata", Pairs(rows)), ("planner_data", None), ("storage_data", Pairs(items))]
    return dumps(Record(Global(f"{DCP}.metadata", "Metadata"), (), Pairs(fields)), 4)


def _size(numbers: list[int]) -> Record:
    return Record(Global("torch", "Size"), (tuple(numbers),))


def _made(module: str, name: str, **fields: object) -> Record:
    return Record(Global(f"{DCP}.{module}", name), (), Pairs(list(fields.items())))


def _storage_of(dtype: str, shape: list[int], boxes: list[Any]) -> Record:
    properties = Record(
        Global(f"{DCP}.metadata", "TensorProperties"), (), (Global("torch", dtype), None, False, None, False)
    )
    chunks = [_made("metadata", "ChunkStorageMetadata", offsets=_size(a), sizes=_size(n)) for a, n in boxes]
    return _made("metadata", "TensorStorageMetadata", properties=properties, size=_size(shape), chunks=chunks)


def _index_of(key: str, offsets: list[int]) -> Record:
    return _made("metadata", "MetadataIndex", fqn=key, offset=_size(offsets), index=None)


def _info(file: str, offset: int, length: int) -> Record:
    return _made("filesystem", "_StorageInfo", relative_path=file, offset=offset, length=length)
