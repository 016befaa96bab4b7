"""Recorded decoding steps give the bits of steps run one by one; a stand-in for CUDA graphs records on the CPU."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from transcoder import UsageError

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from models import make_model

from transcoder.runtime import decoding
from transcoder.runtime import model as running
from transcoder.runtime.load import load
from transcoder.runtime.model import KVCache, build, stage_forward

LENGTH = 14


class Operations(TorchDispatchMode):
    """Remembers every operation, and can do them all again on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self.done: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, inputs: Any = (), options: Any = None) -> Any:
        found = operation(*inputs, **(options or {}))
        if "empty" not in str(operation):  # which fills nothing
            self.done.append((operation, inputs, options or {}, found))
        return found

    def replay(self) -> None:
        for operation, inputs, options, outputs in self.done:
            again = tree_leaves(operation(*inputs, **options))
            for place, value in zip(tree_leaves(outputs), again, strict=True):
                if torch.is_tensor(place) and place.data_ptr() != value.data_ptr():
                    place.copy_(value)


class Tape:
    """As `decoding.Tape`, of operations instead of kernels."""

    def __init__(self) -> None:
        self.graphs: list[Operations] = []

    def begin(self) -> None:
        self.graphs.append(Operations())
        self.graphs[-1].__enter__()

    def end(self) -> None:
        self.graphs[-1].__exit__(None, None, None)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[Tape]:
    """The tapes that are made; every step of one token of a whole dense model is recorded."""
    made: list[Tape] = []

    def tape() -> Tape:
        made.append(Tape())
        return made[-1]

    monkeypatch.setattr(decoding, "Tape", tape)
    monkeypatch.setattr(decoding, "side_stream", nullcontext)
    monkeypatch.setattr(decoding, "on_gpu", lambda _: True)
    return made


def model_of(folder: Path, kind: str, dtype: str = "float32") -> Any:
    made = make_model(kind, folder / kind)
    model = build(made, dtype=dtype, device="cpu")
    load(model, made)
    return model


def steps(model: Any, tokens: torch.Tensor, cache: KVCache) -> list[torch.Tensor]:
    """Logits of a prompt, then of each further token."""
    parts = [tokens[:, :5], *tokens[:, 5:].split(1, 1)]
    return [stage_forward(model, part, cache=cache) for part in parts]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", ("llama-bias", "mistral", "qwen3"))
def test_recorded_steps_give_the_same_bits(tmp_path: Path, graphs: list[Tape], kind: str, dtype: str) -> None:
    model = model_of(tmp_path, kind, dtype)
    tokens = torch.randint(260, (2, LENGTH), generator=torch.Generator().manual_seed(3))
    cache, plain = KVCache(model, 2, LENGTH), KVCache(model, 2, LENGTH)
    found = steps(model, tokens, cache)
    assert len(graphs) == 1 and len(graphs[0].graphs) == 4 + 1
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "recordable", lambda *_: False)
        wanted = steps(model, tokens, plain)
    assert plain.recorded is None and len(graphs) == 1
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
    assert len({float(each.float().sum()) for each in found}) == len(found) == LENGTH - 4


def test_a_cache_that_is_reset_keeps_its_graphs(tmp_path: Path, graphs: list[Tape]) -> None:
    model = model_of(tmp_path, "llama")
    tokens = torch.randint(260, (1, LENGTH), generator=torch.Generator().manual_seed(4))
    cache = KVCache(model, 1, LENGTH)
    first = steps(model, tokens, cache)
    with pytest.raises(UsageError, match="14 \\+ 1 tokens do not fit a cache of 14"):
        stage_forward(model, tokens[:, :1], cache=cache)
    cache.reset()
    assert all(torch.equal(one, other) for one, other in zip(first, steps(model, tokens, cache), strict=True))
    assert len(graphs) == 1


def test_the_model_still_runs_as_ever_beside_its_graphs(tmp_path: Path, graphs: list[Tape]) -> None:
    model = model_of(tmp_path, "llama")
    tokens = torch.randint(260, (1, LENGTH), generator=torch.Generator().manual_seed(5))
    before = stage_forward(model, tokens)
    steps(model, tokens, KVCache(model, 1, LENGTH))
    assert graphs and torch.equal(stage_forward(model, tokens), before)


def test_a_failure_while_recording_leaves_the_model_as_it_was(
    tmp_path: Path, graphs: list[Tape], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = model_of(tmp_path, "llama")
    tokens = torch.randint(260, (1, LENGTH), generator=torch.Generator().manual_seed(6))
    before, cache = stage_forward(model, tokens), KVCache(model, 1, LENGTH)
    stage_forward(model, tokens[:, :5], cache=cache), stage_forward(model, tokens[:, 5:6], cache=cache)
    with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
        patched.setattr(model.output_layer, "forward", lambda *_args, **_kwargs: 1 / 0)
        stage_forward(model, tokens[:, 6:7], cache=cache)
    assert graphs and cache.recorded is None and cache.used == 6
    assert torch.equal(stage_forward(model, tokens), before)


def test_models_with_experts_are_not_recorded(tmp_path: Path, graphs: list[Tape]) -> None:
    model = model_of(tmp_path, "qwen3-moe")
    tokens = torch.randint(260, (1, LENGTH), generator=torch.Generator().manual_seed(7))
    assert len(steps(model, tokens, KVCache(model, 1, LENGTH))) == LENGTH - 4 and not graphs
