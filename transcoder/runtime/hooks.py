"""Records what every module takes and gives in one forward, as JSON lines; gradients too, after a backward.

A line names a module, its type, its inputs, outputs and weights with their statistics, and under `parts` sketches of
what it shares with a module of the other implementation, in that of Hugging Face's order of features.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from transcoder.runtime.pairing import Part, Parts, global_name
from transcoder.runtime.sketches import plain, sketch, statistics

LOGITS = "logits"  # what a model in transformers gives, and what its records are called
Record = dict[str, Any]


def _tensors(values: Any, name: str = "0") -> Iterable[tuple[str, Any]]:
    """Every tensor of nested tuples and keywords, by name."""
    if isinstance(values, torch.Tensor):
        yield name, values
    elif isinstance(values, tuple | list):
        for number, each in enumerate(values):
            yield from _tensors(each, str(number) if name == "0" else f"{name}.{number}")
    elif isinstance(values, Mapping):
        for key, each in values.items():
            yield from _tensors(each, str(key))


def _described(values: Any) -> list[Record]:
    return [{"name": name, **statistics(tensor)} for name, tensor in _tensors(values)]


def _first(values: Any) -> Any:
    """The first tensor of a module's inputs or outputs."""
    return next((tensor for _, tensor in _tensors(values) if tensor.is_floating_point()), None)


class Recorder:
    """Hooks on every module of a model, and the records that they make; subclasses say what is shared."""

    whole = ""  # how the model itself is called, if it counts

    def __init__(self, model: Any, kind: str, gradients: bool = False) -> None:
        self.records: list[Record] = []
        self.backward: list[Record] = []
        self.kind, self.gradients, self.model = kind, gradients, model
        self.linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
        self._taken: dict[int, Any] = {}
        self._handles: list[Any] = []
        for name, module in model.named_modules():
            if name or self.whole:
                before, after = self._before(self.named(name)), self._after(name)
                self._handles += [
                    module.register_forward_pre_hook(before, with_kwargs=True),
                    module.register_forward_hook(after, with_kwargs=True),
                ]

    def named(self, name: str) -> str:
        """How a module is called in the records."""
        return name

    def shared(self, name: str, side: str, values: Any) -> list[Record]:
        """Sketches of what a module's inputs or outputs share with the other implementation."""
        raise NotImplementedError

    def close(self) -> None:
        """Take the hooks away, and note the gradients of the weights."""
        for handle in self._handles:
            handle.remove()
        if not self.gradients:
            return
        for name, module in self.model.named_modules():
            gradients = {key: each.grad for key, each in module.named_parameters(recurse=False)}
            found = {key: self.complete(name, each) for key, each in gradients.items() if each is not None}
            if found:
                self.backward.append({**self._head(name, module), "weight_gradients": _described(found)})

    def complete(self, name: str, gradient: Any) -> Any:
        """A weight's gradient, of which a process may have a part."""
        return gradient

    def _head(self, name: str, module: Any) -> Record:
        head = {"model": self.kind, "module": self.named(name), "type": type(module).__name__}
        return head | self.place()

    def _before(self, name: str) -> Any:
        def note(module: Any, positional: Any, keywords: Any) -> None:
            inputs = (positional, keywords)
            described = [*_described(positional), *_described(keywords)]
            self._taken[id(module)] = described, self.shared(name, "input", inputs)

        return note

    def _after(self, name: str) -> Any:
        def note(module: Any, positional: Any, keywords: Any, outputs: Any) -> None:
            inputs, parts = self._taken.pop(id(module), ([], []))
            head = self._head(name, module)
            head["module"] += _kind(name, (*positional, *keywords.values()))
            weights = dict(module.named_parameters(recurse=False))
            self.records.append(
                head
                | {"inputs": inputs, "outputs": _described(outputs), "weights": _described(weights)}
                | {"parts": parts + self.shared(head["module"], "output", outputs)}
            )
            if self.gradients:
                self._follow(self._head(name, module), outputs)

        return note

    def _follow(self, head: Record, outputs: Any) -> None:
        tensor = _first(outputs)
        if tensor is not None and tensor.requires_grad:
            tensor.register_hook(lambda grad: self.backward.append({**head, "output_gradients": _described(grad)}))

    def place(self) -> Record:
        """The layout of hidden states, and where this process stands in a model that is cut."""
        return {"layout": "[b, s, h]"}


def _kind(name: str, inputs: tuple[Any, ...]) -> str:
    """The kind of layers that a rotation is asked for, where there are several; it stands behind the module's name."""
    told = (each for each in inputs if isinstance(each, str) and name.endswith(".rotary_emb"))
    return next((f".{kind}" for kind in told), "")


class HfRecorder(Recorder):
    """Of a transformers model: every module has its own name on both sides, the model that of what it gives."""

    whole = LOGITS

    def named(self, name: str) -> str:
        """How a module is called in the records."""
        return name or self.whole

    def shared(self, name: str, side: str, values: Any) -> list[Record]:
        """The first tensor; a router's probabilities, rotary cosines and sines."""
        if name in self.linear:
            rows = _first(values).flatten(0, -2)  # latents are [batch, 1, positions, features]
        else:
            rows = _hf_rows(values) if side == "output" else _rows(_first(values))
        if rows is None:
            return []
        alike = side == "output" and name.endswith(".experts")
        return [{"hf": name, "side": side, "how": "whole", "sketch": _plain(sketch(rows, tokens_alike=alike))}]


def _hf_rows(values: Any) -> Any:
    if isinstance(values, tuple) and len(values) == 3 and _is_choice(values[2]):
        logits, scores, chosen = values
        return torch.zeros(logits.shape, dtype=scores.dtype, device=scores.device).scatter(1, chosen, scores)
    if isinstance(values, torch.Tensor) and values.is_complex():  # a rotation in DeepSeek V2
        return _rows(torch.cat([values.real, values.imag], dim=-1))
    if _is_turn(values):
        return _rows(_turns(*values)) if values[0].dim() == 3 else None
    if not isinstance(values, torch.Tensor | tuple) and not (isinstance(values, Mapping) and LOGITS in values):
        return None
    return _rows(_first(values))


def _is_turn(values: Any) -> bool:
    """Whether these are cosines and sines."""
    tensors = isinstance(values, tuple) and all(isinstance(each, torch.Tensor) for each in values)
    return tensors and len(values) == 2 and values[0].shape == values[1].shape


def _turns(cosines: Any, sines: Any) -> Any:
    """Cosines and sines of each angle once: most models have the same ones for both halves of a head."""
    first, second = cosines.chunk(2, dim=-1)
    count = first.shape[-1] if first.shape == second.shape and torch.equal(first, second) else cosines.shape[-1]
    return torch.cat([cosines[..., :count], sines[..., :count]], dim=-1)


def _is_choice(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.dtype == torch.int64


def _rows(tensor: Any) -> Any:
    """[batch, positions, ...] or [tokens, features] as [tokens, features]; None for anything else."""
    if tensor is None or tensor.dim() < 2:
        return None
    if tensor.dim() == 4 and tensor.stride(1) < tensor.stride(2):  # heads were put in front of positions
        tensor = tensor.transpose(1, 2)
    return tensor.reshape(tensor.shape[0] * tensor.shape[1], -1) if tensor.dim() > 2 else tensor


def _plain(numbers: Iterable[float]) -> list[float | str]:
    return [plain(number) for number in numbers]


class MegatronRecorder(Recorder):
    """Of a megatron-core stage: its parts in Hugging Face's order, as far as this rank has them."""

    def __init__(self, model: Any, parts: Parts, gradients: bool = False) -> None:
        self.parts = parts
        super().__init__(model, "megatron", gradients)

    def named(self, name: str) -> str:
        """Layers counted over all stages."""
        return global_name(self.model, name)

    def place(self) -> Record:
        """Tensor- and pipeline-parallel rank."""
        place = {"tp": mpu.get_tensor_model_parallel_rank(), "pp": mpu.get_pipeline_model_parallel_rank()}
        return {"place": place, "layout": "[s, b, h]"}

    def complete(self, name: str, gradient: Any) -> Any:
        """The sum over the ranks that have a part of it."""
        group = self._sharing(name)
        if group is not None and dist.get_world_size(group) > 1:
            gradient = gradient.clone()
            dist.all_reduce(gradient, group=group)
        return gradient

    def _sharing(self, name: str) -> Any:
        """The ranks that use one weight for different things: norms of heads, and words that go in and come out."""
        if name.endswith(("q_layernorm", "k_layernorm")) and not self.model.config.multi_latent_attention:
            return mpu.get_tensor_model_parallel_group()
        tied = getattr(self.model, "share_embeddings_and_output_weights", False)
        if tied and name in ("embedding.word_embeddings", "output_layer"):
            return mpu.get_embedding_group()
        return None

    def shared(self, name: str, side: str, values: Any) -> list[Record]:
        """What the recipe pairs; core attention's output is the next layer's input."""
        found = [part for part in self.parts.get(name, ()) if _side(name, part) == side]
        tensor = _first(values) if found else None
        if tensor is None:
            return []
        return [self._sketched(name, part, tensor) for part in found]

    def _sketched(self, name: str, part: Part, tensor: Any) -> Record:
        if part.how == "experts":
            numbers, how = sketch(tensor, tokens_alike=True), "experts"
        elif part.how == "angles":
            numbers, how = sketch(self._angles(tensor, part.here)), "whole"
        elif part.how == "heads":
            numbers, how = self._heads(name, _megatron_rows(name, tensor)), "cut"
        else:
            rows = _megatron_rows(name, tensor)
            rows = rows if part.here is None else rows[:, part.here.to(rows.device)]
            numbers, how = sketch(rows, part.there), part.how
        return {"hf": part.hf, "side": part.side, "how": how, "sketch": _plain(numbers)}

    def _angles(self, tensor: Any, kind: int | None) -> Any:
        """Cosines and sines as attention uses them: with megatron's factor, rounded to the model's type.

        kind: which of several rotations, of which the first alone has the factor.
        """
        config, tensor = self.model.config, tensor if kind is None else tensor[kind]
        stretch = None if kind else getattr(config, "yarn_rotary_scaling_factor", None)
        factor = 0.1 * math.log(stretch) + 1.0 if stretch else 1.0
        rows = _rows(tensor.transpose(0, 1))
        turns = _turns(rows.cos() * factor, rows.sin() * factor)
        return turns if config.wide_rotation else turns.to(config.params_dtype)

    def _heads(self, name: str, rows: Any) -> list[float]:
        """This rank's share of a sum over all heads; ranks may have the same ones."""
        config, size, rank = self.model.config, mpu.get_tensor_model_parallel_world_size(), self.place()["place"]["tp"]
        heads = config.num_query_groups if name.endswith("k_layernorm") else config.num_attention_heads
        width = rows.shape[1]
        copies = size * width // (heads * config.kv_channels)
        start = rank // copies * width
        return [value / copies for value in sketch(rows, torch.arange(start, start + width))]


def _side(name: str, part: Part) -> str:
    return "output" if name.endswith(".core_attention") else part.side


def _megatron_rows(name: str, tensor: Any) -> Any:
    """[positions, batch, ...] as [tokens, features] in the order of [batch, positions]; embeddings are that already."""
    if tensor.dim() > 2 and not name.endswith("word_embeddings"):
        tensor = tensor.transpose(0, 1)
    return _rows(tensor)


def write_log(path: Path, records: Iterable[Record]) -> None:
    """One JSON object a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, allow_nan=False) + "\n" for record in records)
