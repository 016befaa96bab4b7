"""Legacy rank files bound to a model: which box of which stored tensor every rank's piece is, by the rules' own marks.

A rank's tensor holds its parts of a dimension one after the other: its gate rows, then its up rows. Each part is a
chunk of its own, a contiguous range of the payload.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product as combinations
from math import prod

from transcoder.errors import Problem, refuse
from transcoder.foreign import HEAD
from transcoder.formats.foreign import PlainDcp
from transcoder.formats.rankfiles import Piece, RankStore
from transcoder.formats.store import LeftOut, Store
from transcoder.layout import Cut
from transcoder.planner import Model
from transcoder.spec import Box, Catalog, Chunk, TensorSpec

Cuts = tuple[tuple[Cut, ...], ...]  # per dimension
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"


@dataclass(frozen=True)
class BoundRanks(RankStore):
    """Rank files whose tensors are known by their boxes."""

    catalog: Catalog = None  # type: ignore[assignment]


def bound(store: Store, model: Model) -> Store:
    """The store with every piece in its place; other formats say themselves where their chunks lie.

    Raises InputError listing pieces that do not have the shape that the model's rules give their rank.
    """
    if not isinstance(store, RankStore):
        return _without_copy(store, model)
    problems = list[Problem]()
    copied = {OUTPUT} - model.mcore.keys() if EMBEDDING in store.pieces else set()  # of a tied model's last stage
    specs = {key: _spec(store, model, key, problems) for key in store.pieces if key not in copied}
    if problems:
        raise refuse("ranks", f"tensors of ranks do not fit recipe {model.recipe.name}", problems)
    tensors = {key: (spec.dtype, spec.shape, store.tensors[key][2]) for key, spec in specs.items()}
    fields = {name: getattr(store, name) for name in ("path", "objects", "ignored", "common", "warnings", "sizes")}
    return BoundRanks(tensors=tensors, pieces=store.pieces, records=store.records, catalog=specs, **fields)


def _without_copy(store: Store, model: Model) -> Store:
    """The store without the output layer that a trainer saved although the model's is its embedding."""
    if not isinstance(store, PlainDcp) or HEAD in model.mcore or HEAD not in store.tensors:
        return store
    dtype, shape, _ = store.tensors[HEAD]
    left = LeftOut(1, prod(shape) * dtype.size, "a copy of the embedding")
    tensors = {key: value for key, value in store.tensors.items() if key != HEAD}
    return replace(store, tensors=tensors, ignored={**store.ignored, HEAD: left})


def _spec(store: RankStore, model: Model, key: str, problems: list[Problem]) -> TensorSpec:
    """The tensor with its chunks, each taken from the first rank that has it."""
    dtype, shape, _ = store.tensors[key]
    tensor, chunks, cuts = model.mcore.get(key), dict[Box, Chunk](), Cuts()
    if tensor is None:
        return TensorSpec(key, dtype, shape, ())
    layout = tensor.family.mcore[tensor.part].layout
    for piece in store.pieces[key]:
        try:
            cuts = cuts or layout.cuts(tensor.family.sizes, store.sizes)
            if piece.stored.dtype != dtype:
                raise ValueError(f"another rank has {dtype.name}")
            for chunk in _chunks(cuts, piece):
                chunks.setdefault(chunk.box, chunk)
        except ValueError as error:  # LayoutError is one
            rule, found = tensor.family.rule.label, f"{piece.stored.dtype.name} {list(piece.stored.shape)}"
            problems.append(Problem(str(error), piece.file, key, rule, expected="this rank's part of it", found=found))
    return TensorSpec(key, dtype, tensor.shape, tuple(chunks.values()))


def _chunks(whole: Cuts, piece: Piece) -> Iterator[Chunk]:
    """The boxes that a rank's tensor holds, with their ranges of its payload. Raises ValueError when it does not fit.

    whole: all parts into which the grid cuts each dimension.
    """
    cuts = [_own(dim, piece) for dim in whole]
    local = tuple(sum(cut.stop - cut.start for cut in dim) for dim in cuts)
    if (local[1:] if piece.expert >= 0 else local) != piece.stored.shape:
        raise ValueError(f"the rule gives it shape {list(local)}")
    several = [i for i, dim in enumerate(cuts) if len(dim) > 1]
    if len(several) > 1 or (several and prod(local[: several[0]]) != 1):
        raise ValueError("its parts do not lie one after the other")
    place, size = piece.stored.start, piece.stored.dtype.size
    for parts in combinations(*cuts):
        box = tuple((part.start, part.stop) for part in parts)
        nbytes = prod(stop - start for start, stop in box) * size
        yield Chunk(box, piece.file, place, nbytes, None if several else piece.stored.crc)
        place += nbytes


def _own(dim: tuple[Cut, ...], piece: Piece) -> tuple[Cut, ...]:
    """The parts of a dimension that are a piece's; of experts, the one that it is."""
    if dim and any(name == "e" for name, _ in dim[0].at):
        return dim[piece.expert : piece.expert + 1] if piece.expert >= 0 else ()
    return tuple(cut for cut in dim if all(piece.at.get(name, index) == index for name, index in cut.at))
