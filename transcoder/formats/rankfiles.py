"""Legacy Megatron checkpoints: `mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt`, one torch.save per model-parallel rank.

Here the grid cuts the content: every file has the tensors of its rank under the names of its modules, layers and
experts counted from 0 (megatron/training/checkpointing.py, `get_checkpoint_name`). The pickles are read as inert data;
payloads stay where they are, often inside one buffer that a rank's parameters share.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

from transcoder.errors import InputError, Problem, refuse
from transcoder.formats.archive import (
    COMMON_PICKLE_LIMIT,
    StoredTensor,
    check_order,
    place_tensor,
    read_archive,
    unpickle,
)
from transcoder.formats.localnames import LEGACY_EXPERTS, cut_axis, layer_of, newer_name, renumbered, stored_key
from transcoder.formats.pickles import Pairs, Record
from transcoder.formats.statefiles import plain
from transcoder.formats.store import Item, LeftOut, Store
from transcoder.formats.zips import Entry
from transcoder.paths import map_file
from transcoder.spec import DTYPES, Box, Chunk, DType, TensorSpec

FILES = ("model_optim_rng.pt", "model_rng.pt")
OPTIMIZER = "distrib_optim.pt"
_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_MODEL = re.compile(r"model(\d*)")
OLDER = "language_model"  # of Megatron-LM's classes before megatron-core, which nest their states
COPY = "word_embeddings_for_head."  # the embedding once more, on the last stage of an older class
Sizes = Mapping[str, int]


@dataclass(frozen=True, slots=True)
class Piece:
    """A tensor of one rank: its coordinates, and the expert among all (-1 for none)."""

    file: str
    at: Sizes
    expert: int
    stored: StoredTensor


@dataclass(frozen=True)
class RankStore(Store):
    """An opened checkpoint; `pieces` by per-layer key. Shapes are global as far as names tell which axis is cut."""

    form = "torch"
    index = ()
    sizes: Sizes = field(default_factory=dict)  # of the grid that wrote it: tp, pp, ep, etp
    pieces: Mapping[str, tuple[Piece, ...]] = field(default_factory=dict)
    records: Mapping[str, Mapping[str, Entry]] = field(default_factory=dict)  # by file

    @cached_property
    def catalog(self) -> dict[str, TensorSpec]:
        """The records of the files, which have checksums; tensors are found once a model says how they are cut."""
        return {f"{file}: {name}": _bytes(file, name, entry) for file, name, entry in self._records()}

    def _records(self) -> Iterator[tuple[str, str, Entry]]:
        for file, entries in self.records.items():
            for name, entry in entries.items():
                yield file, name, entry


def _bytes(file: str, name: str, entry: Entry) -> TensorSpec:
    chunk = Chunk(((0, entry.size),), file, entry.start, entry.size, entry.crc)
    return TensorSpec(f"{file}: {name}", DTYPES["uint8"], (entry.size,), (chunk,))


def is_ranks(folder: Path) -> bool:
    """Whether the folder holds an iteration of this format."""
    return folder.is_dir() and any(True for _ in _files(folder))


def _files(folder: Path) -> Iterator[tuple[tuple[int, ...], str]]:
    """Numbers of every rank, and the name of its file."""
    for entry in sorted(folder.glob("mp_rank_*")):
        found = _FOLDER.fullmatch(entry.name)
        name = next((name for name in FILES if (entry / name).is_file()), "")
        if found and name:
            yield tuple(int(number) for number in found.groups() if number), f"{entry.name}/{name}"


@dataclass(frozen=True, slots=True)
class _Rank:
    """One file: the tensors of its model chunks by name, and its plain values."""

    numbers: tuple[int, ...]
    file: str
    chunks: tuple[Mapping[str, StoredTensor], ...]
    values: Mapping[str, object]
    entries: Mapping[str, Entry]


def open_ranks(folder: Path) -> RankStore:
    """The checkpoint in an iteration directory. Raises InputError for anything that is not whole."""
    ranks = [_read(folder, numbers, file) for numbers, file in _files(folder)]
    common = {name: plain(ranks[0].values[name]) for name in ("args", "iteration") if name in ranks[0].values}
    arguments = common.get("args")
    sizes, places = _grid(ranks, arguments if isinstance(arguments, dict) else {})
    pieces, first = dict[str, list[Piece]](), _first_layers(ranks, places)
    for rank, at in zip(ranks, places, strict=True):
        for virtual, tensors in enumerate(rank.chunks):
            for key, piece in _pieces(rank.file, tensors, first[virtual, at["pp"]], at):
                pieces.setdefault(key, []).append(piece)
    return RankStore(
        folder,
        {key: _tensor(key, parts, sizes) for key, parts in pieces.items()},
        {},
        _left_out(folder, ranks),
        common,
        (),
        sizes,
        {key: tuple(parts) for key, parts in pieces.items()},
        {rank.file: rank.entries for rank in ranks},
    )


def _read(folder: Path, numbers: tuple[int, ...], file: str) -> _Rank:
    view = map_file(folder / file, root=folder)
    entries = read_archive(view, file)
    check_order(view, entries, file)
    root = unpickle(view, entries["data.pkl"], None, file, COMMON_PICKLE_LIMIT)
    if not isinstance(root, Pairs):
        raise refuse("ranks", f"{file} does not hold the state of a rank", [Problem(file=file)])
    values = {key: value for key, value in root if isinstance(key, str)}
    models = sorted((int(found[1] or 0), name) for name in values if (found := _MODEL.fullmatch(name)))
    if not models:
        raise refuse("ranks", f"{file} holds no model", [Problem(file=file, found=", ".join(sorted(values))[:200])])
    _check_version(values, file)
    chunks = tuple(dict(_tensors(values[name], entries, file)) for _, name in models)
    return _Rank(numbers, file, chunks, values, entries)


def _tensors(model: object, entries: Mapping[str, Entry], file: str) -> Iterator[tuple[str, StoredTensor]]:
    """The tensors of a model chunk; `_extra_state` apart, which holds no weights."""
    items = _items(model)
    if items is None:
        raise refuse("ranks", f"{file}: the model's state is not a dictionary", [Problem(file=file)])
    older = any(name == OLDER for name, _ in items)
    for name, value in _flat(model, ""):
        if not name.endswith("_extra_state") and value is not None and not name.startswith(COPY):
            if LEGACY_EXPERTS.fullmatch(name):
                raise _grouped(file, name)
            yield newer_name(name) if older else name, place_tensor(_typed(value), entries, f"{file}: {name}")


def _items(value: object) -> Pairs | None:
    """What a dict or an OrderedDict holds."""
    if isinstance(value, Record) and value.callable.name == "OrderedDict":
        return value.items or Pairs()
    return value if isinstance(value, Pairs) else None


def _flat(value: object, name: str) -> Iterator[tuple[str, object]]:
    """The leaves of nested dictionaries, which older classes save, under dotted names."""
    items = _items(value)
    if items is None:
        yield name, value
    for key, inner in items or ():
        yield from _flat(inner, f"{name}.{key}" if name else str(key))


def _typed(value: object) -> object:
    """A tensor without the wrapper that keeps a subclass or attributes (torch/_tensor.py)."""
    wrapped = isinstance(value, Record) and value.callable.name == "_rebuild_from_type_v2" and len(value.args) == 4
    if wrapped and isinstance(value, Record) and isinstance(value.args[1], tuple):
        return Record(value.args[0], value.args[1])  # type: ignore[arg-type]
    return value


def _check_version(values: Mapping[str, object], file: str) -> None:
    """Refuse the order of query, key and value rows that Megatron-LM had before 2020."""
    version = values.get("checkpoint_version", 3.0)
    if not (isinstance(version, int | float) and version >= 2):
        hint = "load it in Megatron-LM, which turns the rows, and save it again"
        problem = Problem(file=file, expected="checkpoint_version 2.0 or more", found=f"{version!r:.40}", hint=hint)
        raise refuse("older-model", "query, key and value rows are in an order that is not read", [problem])


def _grouped(file: str, name: str) -> InputError:
    hint = "save it once more without --moe-use-legacy-grouped-gemm, or as torch_dist"
    problem = Problem(file=file, tensor=name, expected="experts.linear_fc1.weight0, …", hint=hint)
    return refuse("legacy-experts", "experts of the legacy GroupedMLP lie transposed in one tensor", [problem])


def _grid(ranks: list[_Rank], arguments: Mapping[str, Any]) -> tuple[dict[str, int], list[dict[str, int]]]:
    """tp, pp, ep and etp, and where each rank is on them; refuse files that are missing."""
    if len({len(rank.numbers) for rank in ranks}) != 1:
        raise refuse("ranks", "the ranks' folders are of different grids", [Problem(found=ranks[0].file)])
    long = {"tp": "tensor", "pp": "pipeline", "ep": "expert"}
    said = {name: arguments.get(f"{word}_model_parallel_size") for name, word in long.items()}
    names = _names(len(ranks[0].numbers), said)
    places = [dict.fromkeys(long, 0) | dict(zip(names, rank.numbers, strict=True)) for rank in ranks]
    sizes = {name: 1 + max(at[name] for at in places) for name in long}
    _check_grid(places, sizes, {name: n for name, n in said.items() if type(n) is int})
    etp = arguments.get("expert_tensor_parallel_size")
    sizes["etp"] = etp if type(etp) is int and 0 < etp <= sizes["tp"] and sizes["tp"] % etp == 0 else sizes["tp"]
    return sizes, [at | {"etp": at["tp"] % sizes["etp"]} for at in places]


def _names(count: int, said: Mapping[str, Any]) -> tuple[str, ...]:
    """What the numbers of a folder count: of two, the second is the expert rank only without a pipeline."""
    second = "ep" if (said["pp"] or 1) == 1 and (said["ep"] or 1) != 1 else "pp"
    return ("tp", second)[:count] if count < 3 else ("tp", "pp", "ep")


def _check_grid(places: list[dict[str, int]], sizes: Sizes, said: Sizes) -> None:
    problems = [
        Problem(message=f"{name} parallel size", expected=f"{count} (args)", found=f"{sizes[name]} in folders' names")
        for name, count in said.items()
        if count != sizes[name]
    ]
    seen = {(at["tp"], at["pp"]) for at in places}
    if len(seen) < sizes["tp"] * sizes["pp"]:
        tp, pp = next(each for each in product(range(sizes["tp"]), range(sizes["pp"])) if each not in seen)
        problems.append(Problem(file=f"mp_rank_{tp:02d}_{pp:03d}", expected="a file of this rank", found="none"))
    if problems:
        raise refuse("ranks", "the files of some ranks are missing", problems)


def _first_layers(ranks: list[_Rank], places: list[dict[str, int]]) -> dict[tuple[int, int], int]:
    """The number of the first layer of every model chunk and stage: layers run through the stages chunk by chunk."""
    counts = dict[tuple[int, int], int]()
    for rank, at in zip(ranks, places, strict=True):
        for virtual, tensors in enumerate(rank.chunks):
            counted = 1 + max(map(layer_of, tensors), default=-1)
            counts[virtual, at["pp"]] = max(counts.get((virtual, at["pp"]), 0), counted)
    first, found = 0, {}
    for place in sorted(counts):
        found[place], first = first, first + counts[place]
    return found


def _pieces(file: str, tensors: Mapping[str, StoredTensor], first: int, at: Sizes) -> Iterator[tuple[str, Piece]]:
    experts = max((stored_key(name, ())[1] for name in tensors), default=-1) + 1
    for name, stored in tensors.items():
        key, expert = stored_key(name, tensors)
        number = at["ep"] * experts + expert if expert >= 0 else -1
        yield renumbered(key, first), Piece(file, at, number, stored)


def _tensor(key: str, pieces: list[Piece], sizes: Sizes) -> tuple[DType, tuple[int, ...], tuple[tuple[Box, Item], ...]]:
    one, axis = pieces[0], cut_axis(key)
    ranks = sizes["etp" if one.expert >= 0 else "tp"]
    shape = tuple(n * ranks if i == axis else n for i, n in enumerate(one.stored.shape))
    shape = (1 + max(piece.expert for piece in pieces), *shape) if one.expert >= 0 else shape
    box = tuple((0, extent) for extent in shape)
    items = tuple((box, Item(piece.file, piece.stored.start, piece.stored.size)) for piece in pieces)
    return one.stored.dtype, shape, items


def _left_out(folder: Path, ranks: list[_Rank]) -> dict[str, LeftOut]:
    """Storages that hold no weights, and the files of distributed optimizers."""
    found = dict[str, LeftOut]()
    for rank in ranks:
        used = [(s.start, s.start + s.size) for tensors in rank.chunks for s in tensors.values()]
        rest = [entry for name, entry in rank.entries.items() if name.startswith("data/") and not _holds(entry, used)]
        if rest:
            name = Path(rank.file).name
            found[name] = LeftOut(len(rest), sum(entry.size for entry in rest)) + found.get(name, LeftOut())
    files = [path for path in folder.glob(f"mp_rank_*/{OPTIMIZER}") if path.is_file()]
    if files:
        found[OPTIMIZER] = LeftOut(len(files), sum(path.stat().st_size for path in files))
    return found


def _holds(entry: Entry, used: list[tuple[int, int]]) -> bool:
    return any(entry.start <= start and stop <= entry.start + entry.size for start, stop in used)
