"""Decoding steps on one GPU as CUDA graphs: all that lies between two attentions is one launch.

To launch a step's kernels one by one from Python takes several times as long as to run them. The attentions are not
recorded: their keys grow with every step, and called as ever they give the very bits that they give without graphs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from transcoder.runtime.layers import CoreAttention

Forward = Callable[[Any, Any], Any]  # of tokens and positions


def on_gpu(tensor: Any) -> bool:
    """Whether a tensor is where graphs are recorded."""
    return bool(tensor.is_cuda)


def recordable(model: Any, tokens: Any) -> bool:
    """Whether a forward is a step of one token on one GPU, without experts: which of them work is not known before."""
    if not on_gpu(tokens) or tokens.shape[1] != 1 or not (model.pre_process and model.post_process):
        return False
    cores = (layer.self_attention.core_attention for layer in model.decoder.layers)
    dense = not model.config.num_moe_experts and all(isinstance(core, CoreAttention) for core in cores)
    return dense and int(model.config.tensor_model_parallel_size) == 1


@contextmanager
def side_stream() -> Iterator[None]:
    """A stream on which graphs can be recorded, once all that was launched is done."""
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield


class Tape:
    """Graphs recorded one behind the other, in memory of their own that they share."""

    def __init__(self) -> None:
        self.graphs: list[Any] = []
        self._pool = torch.cuda.graph_pool_handle()

    def begin(self) -> None:
        """Record what follows instead of running it."""
        self.graphs.append(torch.cuda.CUDAGraph())
        # another thread, such as NCCL's watchdog, may do what this one may not
        self.graphs[-1].capture_begin(self._pool, capture_error_mode="thread_local")

    def end(self) -> None:
        """Record no more."""
        self.graphs[-1].capture_end()


@contextmanager
def attending(model: Any, instead: Callable[..., Any]) -> Iterator[None]:
    """Let `instead(core, layer number, query, key, value, ...)` stand for the forward of every attention of a model.

    core: what the forward was, to be called with the same arguments from query on.
    """
    layers = [(layer.self_attention.core_attention, layer.layer_number) for layer in model.decoder.layers]
    found = [vars(core).get("forward") for core, _ in layers]
    try:
        for core, number in layers:
            core.forward = partial(instead, core.forward, number)
        yield
    finally:
        for (core, _), forward in zip(layers, found, strict=True):
            vars(core).pop("forward")
            vars(core).update({"forward": forward} if forward else {})


@dataclass(frozen=True)
class Attention:
    """One attention of a recorded step: the tensors that the graph before it fills, and the one that it must fill."""

    core: Callable[..., Any]
    layer: int
    query: Any
    key: Any
    value: Any
    out: Any

    def run(self, cache: Any) -> None:
        """Attend over all that is cached and the new token."""
        self.out.copy_(self.core(self.query, *cache.extended(self.layer, self.key, self.value)))


class Recorded:
    """One forward of a token for each sequence, which can be repeated with other tokens at other positions.

    Hooks on the model's modules are not called. Parameters may change their values, not their place in memory.
    """

    def __init__(self, model: Any, forward: Forward, tokens: Any, positions: Any) -> None:
        self._tokens, self._positions = tokens.clone(), positions.clone()
        self._attentions: list[Attention] = []
        tape = Tape()
        with side_stream(), attending(model, partial(self._pause, tape)):
            tape.begin()
            try:
                self._out = forward(self._tokens, self._positions)
            finally:
                tape.end()
        self._graphs = tape.graphs

    def _pause(self, tape: Any, core: Any, number: int, query: Any, key: Any, value: Any, *_: Any, **__: Any) -> Any:
        """In place of an attention: its output, still unfilled."""
        out = query.new_empty((*query.shape[:2], query.shape[2] * value.shape[3]))
        tape.end()
        self._attentions.append(Attention(core, number, query, key, value, out))
        tape.begin()
        return out

    def step(self, cache: Any, tokens: Any, positions: Any) -> Any:
        """The forward's result for other tokens, which join the cache. Raises UsageError when it is full."""
        with cache.growing(1):
            self._tokens.copy_(tokens)
            self._positions.copy_(positions)
            for graph, attention in zip(self._graphs, self._attentions, strict=False):  # one graph more
                graph.replay()
                attention.run(cache)
            self._graphs[-1].replay()
        return self._out.clone()
