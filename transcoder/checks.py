"""Proofs before any byte moves: both sides hold exactly the planned tensors, and every element moves exactly once."""

from __future__ import annotations

import difflib
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from functools import lru_cache
from math import prod

from transcoder.atlas import Atlas
from transcoder.errors import LISTED_PROBLEMS, Problem, refuse
from transcoder.formats.torch_dist import check_tiling
from transcoder.planner import HfTensor, Model
from transcoder.recipe import pattern
from transcoder.spec import Box, Catalog, DType, TensorSpec, box_shape


def check_hf(model: Model, catalog: Catalog, dtype: DType, ignored: Iterable[str] = ()) -> None:
    """Refuse unless the files hold exactly the tensors of the model. Raises InputError listing every problem."""
    problems = [*_missing(model, catalog), *_unknown(model, catalog, set(ignored)), *_biases(model, catalog)]
    for name, tensor in model.hf.items():
        spec = catalog.get(name)
        if spec is not None and spec.shape != tensor.shape:
            problems.append(
                _problem(
                    tensor, spec, str(list(tensor.shape)), str(list(spec.shape)), "the config disagrees with the files"
                )
            )
        elif spec is not None and not tensor.family.accepts(spec.dtype, dtype):
            problems.append(
                _problem(
                    tensor,
                    spec,
                    tensor.family.dtype(dtype).name,
                    spec.dtype.name,
                    "convert the tensor or correct the config's dtype",
                )
            )
    if problems:
        raise refuse("tensors", f"{len(problems)} tensors do not fit recipe {model.recipe.name}", problems)


def _problem(tensor: HfTensor, spec: TensorSpec, expected: str, found: str, hint: str) -> Problem:
    label = tensor.family.rule.label
    return Problem(file=spec.chunks[0].file, tensor=spec.name, rule=label, expected=expected, found=found, hint=hint)


def _missing(model: Model, catalog: Catalog) -> Iterator[Problem]:
    for name, tensor in model.hf.items():
        if name not in catalog:
            yield Problem(
                tensor=name,
                rule=tensor.family.rule.label,
                expected=f"a tensor of shape {list(tensor.shape)}",
                found="no such tensor in any file",
                hint="the download may be incomplete, or the config may not belong to these files",
            )


def _unknown(model: Model, catalog: Catalog, ignored: set[str]) -> Iterator[Problem]:
    patterns = {side.name: family.rule for family in model.families for side in family.rule.hf}
    unknown = [name for name in catalog if name not in model.hf and name not in ignored]
    for number, name in enumerate(unknown):
        sought = [re.sub(r"\b\d+\b", "{l}", name)] if number < LISTED_PROBLEMS else []  # it takes a while
        near = [match for text in sought for match in difflib.get_close_matches(text, patterns, 1)]
        nearest = f"nearest is {near[0]} in recipe {model.recipe.name}" if near else f"recipe {model.recipe.name}"
        hint = "add a rule, or list the name under ignore"
        yield Problem(file=catalog[name].chunks[0].file, tensor=name, rule=nearest, found="no rule matches", hint=hint)


def _biases(model: Model, catalog: Catalog) -> Iterator[Problem]:
    """A config that speaks of biases where no file holds one does not belong to these files."""
    if model.values.get("attention_bias") is True and not any(key.endswith(".bias") for key in catalog):
        yield Problem(file="config.json", message="attention_bias = True", expected="biases", found="none in any file")


def ignored_names(model: Model, catalog: Catalog) -> set[str]:
    """Tensors of the files that the recipe lists under `ignore`."""
    patterns = [pattern(text) for text in model.recipe.ignore]
    return {name for name in catalog if any(each.fullmatch(name) for each in patterns)}


def check_mcore(model: Model, catalog: Catalog) -> None:
    """Refuse unless the checkpoint holds exactly the tensors of the model. Raises InputError listing every problem."""
    problems = []
    for name, tensor in model.mcore.items():
        spec = catalog.get(name)
        expected = f"a tensor of shape {list(tensor.shape)}"
        if spec is None:
            problems.append(Problem(tensor=name, rule=tensor.family.rule.label, expected=expected, found="no such key"))
        elif spec.shape != tensor.shape:
            problems.append(
                Problem(tensor=name, rule=tensor.family.rule.label, expected=expected, found=str(list(spec.shape)))
            )
    for name in catalog:
        if name not in model.mcore:
            problems.append(Problem(tensor=name, rule=f"recipe {model.recipe.name}", found="no rule matches"))
    if problems:
        raise refuse("tensors", f"{len(problems)} stored tensors do not fit recipe {model.recipe.name}", problems)


def check_coverage(model: Model, atlas: Atlas) -> None:
    """Prove from integers that every element of both sides is moved exactly once, filler apart.

    Cells of a layout are disjoint and chunks tile their tensors, so counts decide. Raises InputError.
    """
    for name, other in model.mcore.items():
        check_tiling(name, other.shape, [chunk.box for chunk in atlas.catalog[name].chunks])
    filled: dict[int, int] = defaultdict(int)  # elements by the chunk's identity: the catalog holds each chunk once
    problems = []
    for tensor in model.hf.values():
        moved = 0
        for chunks, shares in atlas.shares(tensor):
            for position, count in shares:
                filled[id(chunks[position])] += count * (not tensor.family.rule.alias)
                moved += count
        if moved != prod(tensor.shape):
            problems.append(
                Problem(tensor=tensor.name, expected=f"{prod(tensor.shape)} elements", found=f"{moved} in the chunks")
            )
    for _, filler in model.fillers():
        for chunk, copy in atlas.fillers(filler):
            filled[id(chunk)] += copy.count
    for name in model.mcore:
        for chunk in atlas.catalog[name].chunks:
            if filled.get(id(chunk), 0) != _volume(chunk.box):
                problems.append(Problem(tensor=name, message=f"chunk {chunk.box} is not covered exactly once"))
    if problems:
        raise refuse("coverage", "the plan does not cover every element exactly once", problems)


@lru_cache(maxsize=4096)
def _volume(box: Box) -> int:
    return prod(box_shape(box))
