"""DeepSeek V2 and V3, Kimi K2, GLM-4.5 and dots.llm1 say what they say in transformers, on every kind of grid."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from generating import TOLERANCE, ask_transformers, assert_says, launch, model_of, request_of, steps_of, tokens_of
from routed_models import KINDS, VOCABULARY, make_model

import transcoder
from transcoder.hfconfig import read_config
from transcoder.runtime import reference
from transcoder.runtime.cache import KVCache
from transcoder.runtime.device import shutdown
from transcoder.runtime.model import stage_forward

CLASSES = tuple(dict.fromkeys(name for _, _, name in KINDS.values()))
LENGTH, LIMIT, WORDS = 60, 8, "The assert statement!!"  # more tokens than yarn's original 32 positions
HALVES = ({"tp": 2}, {"pp": 2}, {"ep": 2})
QUARTERS = ({"tp": 2, "pp": 2}, {"tp": 2, "pp": 2, "ep": 2}, {"ep": 4}, {"pp": 4}, {"tp": 2, "ep": 2, "etp": 2})
TARGETS = {"deepseek-v2": {"layout": "per-layer"}, "kimi-k2": {"layout": "singleton"}, "dots1": {"norm_names": "local"}}

Models = Callable[[str], Path]


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A function from a kind to its directory."""
    root = tmp_path_factory.mktemp("routed")
    return cache(lambda kind: make_model(kind, root / kind))


@pytest.fixture(scope="module")
def checkpoints(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Models:
    """A function from a kind to a Megatron checkpoint of it."""
    root = tmp_path_factory.mktemp("converted")

    @cache
    def make(kind: str) -> Path:
        transcoder.hf2mcore(models(kind), root / kind, tp=2, sync=False, **TARGETS.get(kind, {}))
        return root / kind

    return make


@pytest.fixture(scope="module")
def references(models: Models) -> Callable[[str], Any]:
    """A function from a kind to the model in transformers."""
    return cache(lambda kind: reference.load_reference(models(kind), read_config(models(kind)), None, "float32", "cpu"))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_one_rank_has_the_logits_and_the_tokens_of_transformers(
    kind: str, models: Models, checkpoints: Models, references: Callable[[str], Any]
) -> None:
    folder, theirs = models(kind), references(kind)
    tokens = torch.randint(VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))
    want, ours = theirs(tokens).logits, model_of(folder)
    logits = stage_forward(ours, tokens)
    assert logits.shape == want.shape and float((logits - want).abs().max()) <= TOLERANCE * float(want.std())
    assert torch.equal(stage_forward(model_of(folder, checkpoints(kind)), tokens), logits)
    store = KVCache(ours, 2, LENGTH)
    parts = [stage_forward(ours, part, cache=store) for part in tokens.split([40, 15, 1, 1, 1, 1, 1], dim=1)]
    assert float((torch.cat(parts, 1) - logits).abs().max()) <= TOLERANCE * float(want.std())
    request = request_of(folder, WORDS)
    said = [tokens_of(steps_of(ours, folder, request, LIMIT, cached)) for cached in (True, False)]
    assert said[0] == said[1] == ask_transformers(theirs, request.ids, LIMIT)


def check_grids(
    world: int, grids: Any, models: Models, checkpoints: Models, references: Callable[[str], Any], folder: Path
) -> None:
    """Every kind on every grid, from the Hugging Face files and from the checkpoint in turn."""
    pairs = [(kind, grid) for kind in KINDS for grid in grids]
    sources = [(models, checkpoints)[number % 2] for number in range(len(pairs))]
    cases = [
        {"hf": str(models(kind)), "weights": str(source(kind)), "prompt": WORDS, "limit": LIMIT, **grid}
        for (kind, grid), source in zip(pairs, sources, strict=True)
    ]
    found, _ = launch(cases, world, folder)
    for (kind, grid), result in zip(pairs, found, strict=True):
        assert_says(result, models(kind), references(kind), WORDS, LIMIT, (kind, grid))


def test_two_ranks_have_the_logits_and_the_tokens_of_transformers(
    models: Models,
    checkpoints: Models,
    references: Callable[[str], Any],
    tmp_path: Path,
    proves: Callable[..., None],
) -> None:
    proves("logits", *CLASSES)
    check_grids(2, HALVES, models, checkpoints, references, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("grid", QUARTERS, ids=str)
def test_four_ranks_have_the_logits_and_the_tokens_of_transformers(
    grid: dict[str, int], models: Models, checkpoints: Models, references: Callable[[str], Any], tmp_path: Path
) -> None:
    check_grids(4, [grid], models, checkpoints, references, tmp_path)
