"""An adapter bound to a model: which weights it changes, every shape compared, before a payload byte is read."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from transcoder.errors import Problem, refuse
from transcoder.formats.peft import CONFIG, WEIGHTS, Peft, open_peft
from transcoder.notation import leaves
from transcoder.planner import HfTensor, Model, build_model
from transcoder.spec import TensorSpec

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Update:
    """`scale · B · A` of one weight: A is [experts · rank, in], B is [out, rank · experts]; a matrix has one expert.

    turned: the weight's rows run over `in`, as those of an embedding and of some experts do.
    """

    module: str  # that carries the keys
    a: TensorSpec
    b: TensorSpec
    rank: int
    scale: float
    experts: int = 1
    turned: bool = False
    expert: int = 0  # the first whose rows the weight has
    row: int = 0  # of B where an expert's rows begin
    magnitude: TensorSpec | None = None  # DoRA: the length of every row


@dataclass(frozen=True)
class Merge:
    """What is to be merged into the weights of a model; nothing, where there is no adapter."""

    adapter: Peft | None = None
    updates: Mapping[str, Update] = field(default_factory=dict)
    follow_links: bool = False

    @property
    def whole(self) -> Mapping[str, TensorSpec]:
        """Weights that the adapter brings whole."""
        return self.adapter.whole if self.adapter else {}

    @property
    def names(self) -> frozenset[str]:
        """Every weight that changes."""
        return frozenset((*self.updates, *self.whole))

    @property
    def warnings(self) -> tuple[str, ...]:
        """What the adapter's config says that a user should know."""
        return self.adapter.warnings if self.adapter else ()

    @property
    def files(self) -> list[Path]:
        """What is read besides the source."""
        return [self.adapter.path / name for name in (CONFIG, WEIGHTS)] if self.adapter else []


def merge_of(path: Path | None, model: Model, follow_links: bool = False) -> Merge:
    """The adapter in a directory, bound to a model. Raises InputError for what does not fit it."""
    if path is None:
        return Merge()
    adapter = open_peft(path, follow_links)
    return Merge(adapter, bind(adapter, model), follow_links)


def bind(adapter: Peft, model: Model) -> dict[str, Update]:
    """The updates by the names of the weights. Raises InputError naming what fits no weight of the model."""
    found: dict[str, Update] = {}
    problems: list[Problem] = []
    other = stacked(model)
    for module, parts in adapter.parts.items():
        bound = [*_bound(adapter, module, parts, model.hf)]
        if not bound and other is not None:
            bound = [*_bound(adapter, module, parts, other.hf)]
        if len(bound) != 1 or bound[0][0] in found:
            problems.append(_misfit(module, parts, model.hf))
        else:
            found |= dict(bound if bound[0][0] in model.hf else _spread(*bound[0], model, other))
    problems += [
        Problem(file=WEIGHTS, tensor=spec.name, expected=_expected(name, model.hf), found=str(list(spec.shape)))
        for name, spec in adapter.whole.items()
        if name not in model.hf or model.hf[name].shape != spec.shape
    ]
    if problems:
        raise refuse("adapter", f"{len(problems)} parts of the adapter fit no weight of the model", problems)
    _check_ranks(adapter, found)
    return found


def stacked(model: Model) -> Model | None:
    """The same model with its experts as one tensor per layer, if its files have one per expert."""
    if model.values.get("experts") != "per-expert" or "fused" not in model.recipe.hf_variants["experts"]:
        return None
    return build_model(model.recipe, {**model.values, "experts": "fused"}, model.sizes, model.dialect)


def _spread(name: str, update: Update, model: Model, other: Model | None) -> Iterator[tuple[str, Update]]:
    """An update of stacked experts as one of each expert's own weight, which is `out` by `in`."""
    assert other is not None
    whole = other.hf[name]
    key = whole.family.rule.mcore[0].name
    rows = {pair.hf.key - {"e"}: pair.hf.origin[-1 if update.turned else -2] for pair in whole.family.pairs[whole.part]}
    for family in (family for family in model.families if family.rule.mcore[0].name == key):
        for part, side in enumerate(family.rule.hf):
            row = rows[family.pairs[part][0].hf.key]
            for e in range(model.sizes["e"]):
                weight = side.named({**whole.index, "e": e})
                yield weight, replace(update, turned=False, expert=e, row=row)


def _expected(name: str, weights: Mapping[str, HfTensor]) -> str:
    if name in weights:
        return str(list(weights[name].shape))
    kinds = {re.sub(r"\b\d+\b", "0", weight): weight for weight in reversed(list(weights))}
    near = difflib.get_close_matches(re.sub(r"\b\d+\b", "0", name), kinds, 1)
    return f"a weight of the model{f', such as {kinds[near[0]]}' if near else ''}"


def _misfit(module: str, parts: Mapping[str, TensorSpec], weights: Mapping[str, HfTensor]) -> Problem:
    shapes = ", ".join(f"{part} {list(spec.shape)}" for part, spec in sorted(parts.items()))
    return Problem(file=WEIGHTS, tensor=module, expected=_expected(f"{module}.weight", weights), found=shapes)


def _bound(
    adapter: Peft, module: str, parts: Mapping[str, TensorSpec], weights: Mapping[str, HfTensor]
) -> Iterator[tuple[str, Update]]:
    """Weight and update, where the shapes fit: one, unless something is wrong."""
    if f"{module}.weight" in weights:
        yield from _of_module(adapter, module, parts, weights[f"{module}.weight"])
        return
    owner = module
    while owner.endswith(".base_layer"):
        owner = owner.removesuffix(".base_layer")
    for name, tensor in weights.items():
        if name.rpartition(".")[0] == owner and len(tensor.shape) == 3 and set(parts) == {"a", "b"}:
            yield from _of_experts(adapter, module, parts, tensor)


def _of_module(
    adapter: Peft, module: str, parts: Mapping[str, TensorSpec], tensor: HfTensor
) -> Iterator[tuple[str, Update]]:
    turned = "embedding_a" in parts
    a, b = (parts["embedding_a"], parts["embedding_b"]) if turned else (parts["a"], parts["b"])
    rank, inner = a.shape
    shape = (inner, b.shape[0]) if turned else (b.shape[0], inner)
    magnitude = parts.get("magnitude")
    if tensor.shape == shape and b.shape[1] == rank and (magnitude is None or magnitude.shape == shape[:1]):
        scale = adapter.scale(module, rank)
        yield tensor.name, Update(module, a, b, rank, scale, turned=turned, magnitude=magnitude)


def _of_experts(
    adapter: Peft, module: str, parts: Mapping[str, TensorSpec], tensor: HfTensor
) -> Iterator[tuple[str, Update]]:
    """Stacked experts [e, out, in], or [e, in, out]; releases of peft before 0.18 took the last for `out` always."""
    (rows, inner), (outer, columns), (experts, *matrix) = parts["a"].shape, parts["b"].shape, tensor.shape
    if rows != columns or not experts or rows % experts:
        return
    ways = [turned for turned in (False, True) if [outer, inner] == (matrix[::-1] if turned else matrix)]
    if ways:
        rank, turned = rows // experts, output_last(tensor) if len(ways) == 2 else ways[0]
        update = Update(module, parts["a"], parts["b"], rank, adapter.scale(module, rank), experts, turned)
        yield tensor.name, update


def output_last(tensor: HfTensor) -> bool:
    """Whether a weight's last dimension is what the linear gives, not what it takes; Megatron's first one gives."""
    family = tensor.family
    pair = family.pairs[tensor.part][0]
    layouts = family.mcore[pair.part].layout, family.rule.hf[tensor.part].layout
    taken, last = ({axis.name for axis in leaves(layout.dims[-1])} for layout in layouts)
    return not taken & last


def _check_ranks(adapter: Peft, found: Mapping[str, Update]) -> None:
    problems = [
        Problem(file=CONFIG, tensor=name, expected=f"rank {sorted(given)}", found=f"rank {update.rank}")
        for name, update in found.items()
        if update.experts == 1
        and update.rank not in (given := {adapter.rank(update.module), adapter.rank(name.removesuffix(".weight"))})
    ]
    if problems:
        raise refuse("adapter", f"updates have other ranks than {CONFIG} says", problems)
