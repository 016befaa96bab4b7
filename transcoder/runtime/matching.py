"""Compares what a model asks for with what a source stores, strictly both ways."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from transcoder.errors import Problem, refuse
from transcoder.runtime.aliases import stored_as, unused
from transcoder.runtime.shards import Shard, Target

Shapes = Mapping[str, tuple[int, ...]]


def matched(
    chunks: Sequence[Any], shards: Sequence[Shard], stored: Shapes, vocabulary: int, optional: Collection[str] = ()
) -> tuple[list[Target], list[str]]:
    """Every shard with the box of the stored tensor that it is, and the stored tensors of this stage that are left out.

    optional: what a model may leave out as a whole. Raises InputError listing whatever does not fit.
    """
    targets, problems, left_out = list[Target](), [], []
    for shard in shards:
        found = stored_as(shard.key, stored)
        if found is None:
            problems.append(Problem(tensor=shard.key, expected=_text(shard.shape), found="no such tensor"))
            continue
        key, lead = found
        targets.append(Target(shard, key, (*((i, i + 1) for i in lead), *shard.box)))
        if problem := _misfit(shard, key, stored[key], lead, vocabulary):
            problems.append(problem)
    models, used = unwrapped(chunks), {target.key for target in targets}
    first, last = (any(getattr(part, name, True) for part in models) for name in ("pre_process", "post_process"))
    whole = not used.intersection(optional)
    for key in unused(used, stored, [shard.key for shard in shards], first, last):
        if whole and key in optional:
            left_out.append(key)
            continue
        problems.append(Problem(tensor=key, expected="no such tensor in this model", found=_text(stored[key])))
    if problems:
        distinct = list(dict.fromkeys(problems))
        raise refuse("tensors", f"{len(distinct)} tensors of the model and the source do not fit", distinct)
    return targets, left_out


def _text(shape: Sequence[int]) -> str:
    return f"a tensor of shape {list(shape)}"


def _misfit(shard: Shard, key: str, found: tuple[int, ...], lead: tuple[int, ...], vocabulary: int) -> Problem | None:
    """What is wrong with the stored shape, if anything: rows of a vocabulary may differ where they are padding."""
    front, rest = found[: len(lead)], found[len(lead) :]
    fits = len(front) == len(lead) and all(i < size for i, size in zip(lead, front, strict=True))
    if fits and rest == shard.shape:
        return None
    if fits and shard.flexible and rest[1:] == shard.shape[1:]:
        few, many = sorted((rest[0], shard.shape[0]))
        if few >= vocabulary > 0 or (not vocabulary and rest[0] == few):
            return None
        hint = f"the vocabulary has {vocabulary} rows" if vocabulary else "give hf_model to tell padding from tokens"
        return Problem(
            "", "", key, "", f"at most {many} rows", f"{rest[0]} stored, {shard.shape[0]} in the model", hint
        )
    return Problem(tensor=key, expected=_text((*front, *shard.shape)), found=_text(found))


def unwrapped(chunks: Iterable[Any]) -> list[Any]:
    """The innermost models: without the wrappers of training, without a vision tower."""
    found = []
    for chunk in chunks:
        while inner := getattr(chunk, "module", None) or getattr(chunk, "language_model", None):
            chunk = inner
        found.append(chunk)
    return found
