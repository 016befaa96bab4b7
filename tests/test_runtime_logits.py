"""Logits of transformers on every kind of grid, bit for bit in bfloat16 on one rank, and a real model on request."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from command_line import EXAMPLE
from generating import ask_transformers, assert_says, launch, model_of, request_of, steps_of, tokens_of
from models import make_model, read_config

from transcoder.runtime.device import shutdown
from transcoder.runtime.model import stage_forward

DENSE = ("llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3")
GRIDS: list[tuple[str, dict[str, int]]] = [
    ("llama", {"tp": 4}),
    ("qwen3", {"tp": 4}),
    ("llama-tied", {"tp": 2, "pp": 2}),
    ("qwen2", {"tp": 2, "pp": 2}),
    ("qwen3-moe", {"ep": 2, "tp": 2}),
    ("mixtral", {"ep": 2, "etp": 2, "tp": 2}),
]
LAYERS, LIMIT, WORDS = 2, 8, "!! ab"
REAL = os.environ.get("SMOLLM2", "")  # the directory of SmolLM2-135M


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


def speaking(kind: str, folder: Path) -> Path:
    """A tiny random model with a tokenizer."""
    make_model(kind, folder, num_hidden_layers=LAYERS, vocab_size=1024)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, folder)
    return folder


def reference(folder: Path, dtype: Any) -> Any:
    """The model in transformers."""
    from transformers import AutoModelForCausalLM

    options = {"experts_implementation": "eager"} if "num_experts_per_tok" in read_config(folder) else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa", **options).eval()


def test_logits_and_tokens_are_those_of_transformers_at_four_processes(tmp_path: Path) -> None:
    folders = {kind: speaking(kind, tmp_path / kind) for kind, _ in GRIDS}
    cases = [{"hf": str(folders[kind]), "prompt": WORDS, "limit": LIMIT, **grid} for kind, grid in GRIDS]
    found, _ = launch(cases, 4, tmp_path)
    for (kind, grid), result in zip(GRIDS, found, strict=True):
        assert_says(result, folders[kind], reference(folders[kind], torch.float32), WORDS, LIMIT, (kind, grid))


@torch.no_grad()
@pytest.mark.parametrize("kind", DENSE)
def test_dense_models_in_bfloat16_have_the_bits_of_transformers(kind: str, tmp_path: Path) -> None:
    folder = make_model(kind, tmp_path / kind)
    tokens = torch.randint(263, (2, 33), generator=torch.Generator().manual_seed(5))
    want = reference(folder, torch.bfloat16)(tokens).logits
    ours = model_of(folder, dtype="bfloat16")
    assert torch.equal(stage_forward(ours, tokens), want)
    assert want.dtype == torch.bfloat16 and len(want.unique()) > 500


if REAL:

    def test_a_real_model_says_what_it_says_in_transformers() -> None:
        folder = Path(REAL)
        request, model = request_of(folder, "Once upon a time"), model_of(folder)
        want = ask_transformers(reference(folder, torch.float32), request.ids, 64)
        assert tokens_of(steps_of(model, folder, request, 64)) == want and len(want) == 64
