"""Which module of a live megatron-core model computes what which Hugging Face module computes, from the recipe's rules.

A rule says which elements of a weight are which. Rows of a linear layer's weight are its outputs and columns its
inputs, so the same rule tells how fused and cut activations are to be taken apart. Only what has no weight of its own
(attention, rotary angles, the logits, blocks of modules) is named here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from transcoder.atlas import Atlas
from transcoder.dialects import dialect_of
from transcoder.importing import ImportPlan, plan_import
from transcoder.mesh import Mesh
from transcoder.moves import Copy
from transcoder.planner import HfTensor
from transcoder.runtime.joining import finishes
from transcoder.runtime.matching import matched
from transcoder.runtime.omitted import optional_parts
from transcoder.runtime.rotary import FULL
from transcoder.runtime.shards import Target, shards_of
from transcoder.runtime.switches import SLIDING
from transcoder.spec import DTYPES, Box, Chunk, TensorSpec

SPELLINGS = ((".", "."), ("model.", "model.language_model."), (".block_sparse_moe.", ".mlp."))  # files, transformers
BLOCKS = {"self_attn": "self_attention", "mlp": "mlp"}
_BLOCK = re.compile(r"(.*\blayers\.\d+)(?:\.(self_attn|mlp)\b)?")


@dataclass(frozen=True, eq=False)
class Part:
    """What of a module's input or output is what of a Hugging Face module's.

    how: "cut" where tensor-parallel ranks have different features, "whole" where each has all, "heads" where each has
    its attention heads, "experts" where the ranks together have every expert's part for tokens in any order,
    "angles" of rotary embeddings. here, there: numbers of features in this rank's tensor, in the whole; None for all.
    """

    hf: str
    side: str
    how: str = "whole"
    here: Any = None
    there: Any = None


Parts = dict[str, list[Part]]


def global_name(model: Any, name: str) -> str:
    """A module's name with its layer counted from 0 over all stages."""
    if not name.startswith("decoder.layers."):
        return name
    number, *rest = name.removeprefix("decoder.layers.").split(".")
    return ".".join(["decoder.layers", str(model.decoder.layers[int(number)].layer_number - 1), *rest])


def pair(model: Any, folder: Path, hf_modules: Container[str]) -> Parts:
    """By name of this stage's modules, layers counted over all stages, what they share with transformers' modules."""
    plan, targets = _targets(model, folder)
    owner, parts = _owners(model), list[tuple[str, Part]]()
    for target, found in zip(targets, _numbers(plan, targets), strict=True):
        name, offset = owner(target.shard.data.data_ptr())
        for tensor, numbers in found.items():
            parts += _parts(name.removesuffix(".weight"), tensor, numbers, offset, hf_modules)
    parts += [each for name, part in parts for each in _around(name, part)]
    parts += [("rotary_pos_emb", part) for part in _rotations(hf_modules, bool(model.config.local_rotary_base))]
    if model.post_process:
        last = "logits" if finishes(model.config) else "lm_head"
        parts.append(("output_layer", Part(last, "output", here=torch.arange(model.real_vocab))))
    return _grouped(parts)


def _rotations(hf_modules: Container[str], two: bool) -> Iterator[Part]:
    """The rotation, or that of layers that see all tokens and that of layers with windows."""
    for name in ("model.rotary_emb", "model.language_model.rotary_emb"):
        kinds = ((f".{FULL}", 0), (f".{SLIDING}", 1)) if two else (("", None),)
        if name in hf_modules:
            yield from (Part(f"{name}{kind}", "output", "angles", here) for kind, here in kinds)


def _grouped(parts: Sequence[tuple[str, Part]]) -> Parts:
    """Each pair once: core attention's output stands for the input of the layer behind it."""
    found: dict[tuple[str, str, str], Part] = {}
    for name, part in parts:
        key = (name, part.hf, part.side)
        if not (name.endswith(".linear_proj") and part.side == "input"):
            found[key] = _joined(found[key], part) if key in found else part
    grouped: Parts = {}
    for (name, _, _), part in found.items():
        grouped.setdefault(name, []).append(part)
    return grouped


def _joined(one: Part, other: Part) -> Part:
    """A module's outputs that are one tensor's in a file and two of the model's, as those of gate and up."""
    if one.side == "input" or one.there is None:
        return one
    numbers = {name: torch.cat([getattr(each, name) for each in (one, other)]) for name in ("here", "there")}
    return replace(one, **numbers)


def _targets(model: Any, folder: Path) -> tuple[ImportPlan, list[Target]]:
    """The plan that would fill this model, and each of its weights with the stored box that it is."""
    shards = shards_of([model], None)
    divisor = next((shard.shape[0] for shard in shards if shard.flexible), 1)
    plan = plan_import(folder, Mesh(), layout=dialect_of(shard.key for shard in shards), divisor=divisor)
    shapes = {key: tensor.shape for key, tensor in plan.model.mcore.items()}
    found, _ = matched([model], shards, shapes, plan.model.sizes["vocab"], optional_parts(plan))
    return plan, [target for target in found if target.key.endswith("weight")]


def _owners(model: Any) -> Callable[[int], tuple[str, int]]:
    """From an address to the parameter whose memory is there, and the row of it."""
    spans = [
        (each.data_ptr(), each.nbytes, each.nbytes // each.shape[0], global_name(model, name))
        for name, each in model.named_parameters()
    ]

    def owner(address: int) -> tuple[str, int]:
        return next((name, (address - at) // row) for at, size, row, name in spans if 0 <= address - at < size)

    return owner


@dataclass
class _Numbers:
    """Which rows and columns of this rank's matrix are which of the Hugging Face tensor, which has `counts` of them."""

    counts: tuple[int, int]
    here: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))
    there: tuple[list[Any], list[Any]] = field(default_factory=lambda: ([], []))

    def lines(self, dim: int) -> tuple[Any, Any]:
        """Numbers of rows (0) or columns (1) on both sides."""
        here, there = (torch.from_numpy(np.concatenate(each[dim])) for each in (self.here, self.there))
        return here, there


def _numbers(plan: ImportPlan, targets: Sequence[Target]) -> list[dict[str, _Numbers]]:
    """Per target, for each Hugging Face tensor that has elements of it."""
    chunks: dict[str, list[Chunk]] = {}
    for number, target in enumerate(targets):
        for dim, box in enumerate(_lines(target.box)):
            chunks.setdefault(target.key, []).append(Chunk(box, f"{number} {dim}", 0, 0))
    model, dtype = plan.model, DTYPES["float32"]
    atlas = Atlas({k: TensorSpec(k, dtype, each.shape, tuple(chunks.get(k, ()))) for k, each in model.mcore.items()})
    found: list[dict[str, _Numbers]] = [{} for _ in targets]
    for tensor in (each for each in model.hf.values() if not each.family.rule.alias):
        for _, chunk, copy in atlas.pieces(tensor, 0, prod(tensor.shape)):
            number, dim = map(int, chunk.file.split())
            _note(found[number].setdefault(tensor.name, _Numbers(_matrix(tensor))), copy, dim)
    return found


def _matrix(tensor: HfTensor) -> tuple[int, int]:
    last = tensor.shape[-1] if len(tensor.shape) > 1 else 1
    return prod(tensor.shape) // last, last


def _lines(box: Box) -> Iterator[Box]:
    """The first column and the first row of a matrix, whatever is in front of it; a vector as it is, and an element."""
    (*lead, rows), columns = box[:-1] or ((0, 1),), box[-1]
    front = tuple(lead)
    if len(box) == 1 or rows[1] - rows[0] == 1:
        yield (*front, rows, columns)[-len(box) :]
    else:
        yield (*front, rows, (columns[0], columns[0] + 1))
    yield (*front, (rows[0], rows[0] + 1), columns)[-len(box) :]


def _note(numbers: _Numbers, copy: Copy, dim: int) -> None:
    """Add what a copy of one line says."""
    flat, last = _steps(copy.shape, copy.hf, copy.hf_steps), numbers.counts[1]
    numbers.here[dim].append(_steps(copy.shape, copy.chunk, copy.chunk_steps))
    numbers.there[dim].append(flat % last if dim else flat // last)


def _steps(shape: Sequence[int], start: int, steps: Sequence[int]) -> Any:
    numbers = np.full((1,) * len(shape), start, dtype=np.int64)
    for axis, (size, step) in enumerate(zip(shape, steps, strict=True)):
        numbers = numbers + (np.arange(size) * step).reshape([-1 if each == axis else 1 for each in range(len(shape))])
    return numbers.reshape(-1)


def _module(tensor: str, hf_modules: Container[str]) -> tuple[str, bool]:
    """The module in transformers that holds a tensor of the files, and whether it is its weight alone."""
    stem = tensor.removesuffix(".weight")
    spelled = [stem.replace(old, new, 1) for old, new in SPELLINGS]
    for name in spelled:
        if name in hf_modules:
            return name, True
    for name in spelled:
        while "." in name:
            name = name.rpartition(".")[0]
            if name in hf_modules and name.endswith("experts"):
                return name, False
    return "", False


def _parts(
    name: str, tensor: str, numbers: _Numbers, offset: int, hf_modules: Container[str]
) -> Iterator[tuple[str, Part]]:
    """The parts of a module from one tensor of its weight."""
    hf, alone = _module(tensor, hf_modules)
    if not hf or name == "output_layer":
        return
    if not alone:
        yield name.split(".local_experts.")[0], Part(hf, "output", "experts")
    elif name.endswith(".word_embeddings"):
        yield name, Part(hf, "output")
    elif numbers.counts[1] == 1:
        how = "heads" if hf.endswith(("q_norm", "k_norm")) else "whole"
        yield from ((name, Part(hf, side, how)) for side in ("input", "output"))
    else:
        yield from _linear(name, hf, numbers, offset)


def _linear(name: str, hf: str, numbers: _Numbers, offset: int) -> Iterator[tuple[str, Part]]:
    """Columns are inputs, rows are outputs."""
    for dim, side in ((1, "input"), (0, "output")):
        if not numbers.here[dim]:  # the first row is another tensor's, which has the same input
            continue
        here, there = numbers.lines(dim)
        how = "cut" if len(there) < numbers.counts[dim] else "whole"
        yield name, Part(hf, side, how, here + (offset if dim == 0 else 0), there)


def _around(name: str, part: Part) -> Iterator[tuple[str, Part]]:
    """The parts that follow from one with a weight: of its block, of its layer, of the attention before it."""
    match = _BLOCK.match(part.hf)
    if not match or not name.startswith("decoder.layers."):
        return
    layer, block = name.split(".")[:3], name.split(".")[3]
    if name.endswith(".self_attention.linear_proj") and part.side == "input":
        core = name.replace("linear_proj", "core_attention")
        yield core, Part(part.hf, "input", part.how, part.here, part.there)
    if match[2] and BLOCKS[match[2]] == block:
        yield ".".join([*layer, block]), Part(f"{match[1]}.{match[2]}", "output")
    yield ".".join(layer), Part(match[1], "output")
