"""What needs a GPU and is not run with the other tests: `python -m pytest tests/gpu_checks.py` where there is one.

Logits equal those of transformers, in bfloat16 bit by bit; recorded steps give the bits of steps run one by one; what
is loaded onto the GPU is what is loaded into memory.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from vision_models import make_picture, make_vision_model

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from generating import request_of
from models import EXPERT_KINDS, KINDS, make_model

from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import generation, text
from transcoder.runtime.load import load
from transcoder.runtime.model import KVCache, build, stage_forward
from transcoder.runtime.session import Chosen, Conversation, open_model

DENSE = ("llama", "llama-tied", "llama-bias", "mistral", "qwen2", "qwen3")
LENGTH, STEPS = 33, 24


def opened(folder: Path, dtype: str) -> Any:
    return open_model(read_config(folder), Chosen(folder, folder, Mesh(), dtype, "cuda"))


def transformers_of(folder: Path, dtype: str) -> Any:
    """The model of transformers, its experts one after another: its grouped products need sizes of whole 16 bytes."""
    from transformers import AutoModelForCausalLM

    experts = {"experts_implementation": "eager"} if read_config(folder).get("num_experts_per_tok") else {}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), **experts).cuda().eval()


def tokens_of(batch: int = 1) -> torch.Tensor:
    return torch.randint(260, (batch, LENGTH), generator=torch.Generator().manual_seed(2)).cuda()


@pytest.mark.parametrize("kind", DENSE)
def test_dense_models_have_the_bits_of_transformers_in_bfloat16(tmp_path: Path, kind: str) -> None:
    folder = make_model(kind, tmp_path / kind)
    with torch.no_grad():
        wanted = transformers_of(folder, "bfloat16")(tokens_of(2)).logits
    assert torch.equal(stage_forward(opened(folder, "bfloat16"), tokens_of(2)), wanted)


@pytest.mark.parametrize("kind", (*KINDS, *EXPERT_KINDS))
def test_logits_equal_those_of_transformers_in_float32(tmp_path: Path, kind: str) -> None:
    folder = make_model(kind, tmp_path / kind)
    with torch.no_grad():
        wanted = transformers_of(folder, "float32")(tokens_of(2)).logits
    assert (stage_forward(opened(folder, "float32"), tokens_of(2)) - wanted).abs().max() <= 1e-4 * wanted.std()


def steps_of(model: Any, tokens: torch.Tensor) -> tuple[KVCache, list[torch.Tensor]]:
    """Logits of a prompt, then of each further token."""
    cache = KVCache(model, len(tokens), LENGTH)
    return cache, [stage_forward(model, part, cache=cache) for part in (tokens[:, :9], *tokens[:, 9:].split(1, 1))]


@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
@pytest.mark.parametrize("kind", DENSE)
def test_recorded_steps_give_the_bits_of_steps_run_one_by_one(
    tmp_path: Path, kind: str, dtype: str, batch: int
) -> None:
    model = opened(make_model(kind, tmp_path / kind), dtype)
    cache, found = steps_of(model, tokens_of(batch))
    with patch("transcoder.runtime.model.recordable", return_value=False):
        plain, wanted = steps_of(model, tokens_of(batch))
    assert cache.recorded is not None and plain.recorded is None
    assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))


@pytest.mark.parametrize("kind", (*DENSE, "qwen3-moe", "qwen2-moe"))
def test_tokens_are_the_same_with_a_cache_without_and_in_transformers(tmp_path: Path, kind: str) -> None:
    folder = make_model(kind, tmp_path / kind)
    model, config, ids = opened(folder, "float32"), read_config(folder), tuple(tokens_of()[0, :9].tolist())
    request = generation.Request("", ids)
    talks = [Conversation(model, config, request, len(ids) + STEPS, cached) for cached in (True, False, True)]
    found = [[step.token for step in generation.greedy(talk, text.Habits(frozenset()), STEPS)] for talk in talks]
    reference, tokens = transformers_of(folder, "float32"), tokens_of()[:, :9]
    reference.generation_config.eos_token_id = None
    out = reference.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=STEPS, do_sample=False, use_cache=True
    )
    assert found == 3 * [out[0, 9:].tolist()]


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_an_image_is_answered_by_the_same_tokens_with_and_without_graphs(tmp_path: Path, dtype: str) -> None:
    folder = make_vision_model(tmp_path / "vl")
    request = request_of(folder, "What is it?", (str(make_picture(tmp_path / "one.png", 40, 56)),))
    model, config = opened(folder, dtype), read_config(folder)

    def steps() -> list[generation.Step]:
        talk = Conversation(model, config, request, len(request.ids) + STEPS, cached=True)
        return list(generation.greedy(talk, text.Habits(frozenset()), STEPS))

    found = steps()
    with patch("transcoder.runtime.model.recordable", return_value=False):
        wanted = steps()
    assert all(torch.equal(one.output, other.output) for one, other in zip(found, wanted, strict=True))
    assert len(found) == STEPS


@pytest.mark.parametrize("kind", ("llama-tied", "qwen3-moe"))
def test_a_gpu_holds_what_memory_holds(tmp_path: Path, kind: str) -> None:
    folder = make_model(kind, tmp_path / kind)
    here, there = build(folder, dtype="bfloat16", device="cpu"), build(folder, dtype="bfloat16", device="cuda")
    load(here, folder), load(there, folder)
    pairs = list(zip(here.parameters(), there.parameters(), strict=True))
    assert pairs and all(torch.equal(one, other.cpu()) for one, other in pairs)
