"""Adapters through the rules of the weights that they update: no table of their own.

Where a rule says `out in` on both sides, A takes the axes of `in` and B those of `out`; the rank is one axis more. So
B is fused, padded and cut as the weight is, and A is not fused at all. A fused module (`linear_qkv`, `linear_fc1`) has
an adapter for each of its parts, or one whose A all parts share: PEFT's A is then written once for each part, and read
from equal ones.

Source: Megatron Bridge, peft/utils.py (ParallelLinearAdapter, GroupedExpertLinearAdapter: A of a column-parallel linear
is cut along the rank, B always along its rows, and B of a gated linear_fc1 in two halves, even that of gate or up
alone) and peft/canonical_lora.py (names of the parts).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from transcoder.errors import Problem, UsageError, refuse
from transcoder.formats.peft import PREFIX
from transcoder.layout import parse
from transcoder.lora import PARTS, A, Adapted, B, Form, module_of
from transcoder.notation import Axis, Node, leaves
from transcoder.planner import Family, Model, family_of
from transcoder.recipe import Rule, Side

HINT = "one A serves all parts of a fused module: give --lora-form canonical, or merge the adapter with --merge-adapter"
Sized = tuple[Rule, dict[str, int]]  # a rule and the sizes of the axes that it adds


def adapter_model(base: Model, adapted: Adapted, dialect: str = "") -> Model:
    """The model whose tensors are those of the adapter, on both sides.

    Raises UsageError for keys that do not fit, and for parts of a size that cannot be cut; InputError for other ranks.
    """
    groups = [
        (base.families[number], form, tuple(layer for layer, other in by_layer.items() if other == form))
        for number, by_layer in adapted.items()
        for form in dict.fromkeys(by_layer.values())
    ]
    alike = all(layers in ((-1,), tuple(range(base.sizes["l"]))) for _, _, layers in groups)
    if dialect not in ("", "stacked", "per-layer"):
        raise UsageError(f"adapters have no {dialect} keys; give stacked or per-layer", kind="layout")
    if dialect == "stacked" and not alike:
        raise UsageError("stacked keys need layers that are all adapted alike; per-layer keys fit", kind="layout")
    chosen = dialect or ("stacked" if alike and base.dialect == "stacked" else "per-layer")
    families = tuple(
        family_of(rule, chosen, {**family.sizes, **sizes}, family.layers if layers == (-1,) else layers)
        for family, form, layers in groups
        for rule, sizes in _rules(family, form)
    )
    recipe = replace(base.recipe, extra_state=(), ignore=(), rules=tuple(family.rule for family in families))
    return replace(base, recipe=recipe, dialect=chosen, families=families, alias_hint=HINT)


def _rules(family: Family, form: Form) -> Iterator[Sized]:
    mcore = family.rule.mcore[0]
    stem, (outer, inner) = mcore.name.removesuffix(".weight") + ".adapter", mcore.layout.dims
    mesh = "etp" if "e" in mcore.name_axes else "tp"
    a = f"rank {inner}" if _marked(inner) else f"rank/{mesh} {inner}"
    present = [part for part, rank in enumerate(form.ranks) if rank]
    if not form.split:
        rows = _zeroed(family, outer, present)
        sides = [_peft_sides(family, part, form) for part in present]
        b = f"{rows if _marked(rows) else f'{rows}/{mesh}'} rank"
        yield from _pair(family, f"{stem}.", a, b, sides, {"rank": _one_rank(family, form, present)})
        return
    for part in present:
        name, sizes = f"{stem}.adapter_{PARTS[module_of(family)][part]}.", {"rank": form.ranks[part]}
        if module_of(family) == "linear_fc1":
            yield from _halved(family, name, a, part, form)
        else:
            sides = [_peft_sides(family, part, form)]
            yield from _pair(family, name, a, f"{_output(family, part)}/tp rank", sides, sizes)


def _one_rank(family: Family, form: Form, present: list[int]) -> int:
    ranks = {form.ranks[part] for part in present}
    if len(ranks) > 1:
        problem = Problem(tensor=family.rule.hf[0].name, expected="one rank", found=f"{sorted(ranks)}", hint=HINT)
        raise refuse("adapter", "parts of one module have updates of different ranks", [problem])
    return ranks.pop()


def _pair(
    family: Family, name: str, a: str, b: str, sides: list[tuple[Side, Side]], sizes: dict[str, int]
) -> Iterator[Sized]:
    """A, its repetitions, and B."""
    one, two, stage = Side(name + A, parse(a)), Side(name + B, parse(b)), family.rule.stage
    for number, (side, _) in enumerate(sides):
        yield Rule((one,), (side,), stage=stage, alias=number > 0), sizes
    yield Rule((two,), tuple(side for _, side in sides), stage=stage), sizes


def _halved(family: Family, name: str, a: str, part: int, form: Form) -> Iterator[Sized]:
    """B of gate or up alone: each rank's rows in two halves, all first halves before all second ones."""
    axis, cut, sides = _output(family, part), form.cut, _peft_sides(family, part, form)
    rows = family.sizes[str(axis)]
    if rows % (2 * cut):
        message = f"{sides[1].name}: two halves on {cut} ranks cannot hold {rows} rows; give --lora-form fused"
        raise UsageError(message, kind="mesh")
    one, two = f"{axis}_one", f"{axis}_two"
    sizes = {"rank": form.ranks[part], "cut": cut, one: rows // cut // 2, two: rows // cut // 2}
    hf = sides[0], Side(sides[1].name, parse(f"(cut [{one} {two}]) rank"))
    yield from _pair(family, name, a, f"[(cut {one})/tp (cut {two})/tp] rank", [hf], sizes)


def _peft_sides(family: Family, part: int, form: Form) -> tuple[Side, Side]:
    """PEFT's spelling of A and B for one side of the weight's rule; of stacked experts as one matrix each."""
    side = family.rule.hf[part]
    whole = len(side.layout.dims) == 3
    stem = side.name.rpartition(".")[0] + (form.suffix if whole else "")
    a, b = ("(e rank)", "(rank e)") if whole else ("rank", "rank")
    return (
        Side(f"{PREFIX}{stem}.lora_A.weight", parse(f"{a} {_input(family, part)}")),
        Side(f"{PREFIX}{stem}.lora_B.weight", parse(f"{_output(family, part)} {b}")),
    )


def _turned(family: Family, part: int) -> bool:
    return not _axes(family.rule.mcore[0].layout.dims[1]) & _axes(family.rule.hf[part].layout.dims[-1])


def _axes(node: Node) -> set[str]:
    return {axis.name for axis in leaves(node)}


def _output(family: Family, part: int) -> Node:
    return family.rule.hf[part].layout.dims[-1 if _turned(family, part) else -2]


def _input(family: Family, part: int) -> Node:
    return family.rule.hf[part].layout.dims[-2 if _turned(family, part) else -1]


def _marked(node: Node) -> bool:
    return bool(node.mesh) or (not isinstance(node, Axis) and any(_marked(item) for item in node.items))


def _zeroed(family: Family, outer: Node, present: list[int]) -> Node:
    """The rows of a fused module, those of parts without an update as zeros."""
    updated = {axis for part in present for axis in _axes(_output(family, part))}
    return _renamed(
        outer, {axis for part in range(len(family.rule.hf)) for axis in _axes(_output(family, part))} - updated
    )


def _renamed(node: Node, names: set[str]) -> Node:
    if isinstance(node, Axis):
        return replace(node, name=f"zero_{node.name}") if node.name in names else node
    return replace(node, items=tuple(_renamed(item, names) for item in node.items))
