"""Tokens a second of greedy decoding with a cache: megatron-core in this process, and transformers, in turn.

Both generate after the same prompt with the same weights and threads, in interleaved rounds, so that a slow moment of
the machine meets both. The ratio is of the best rounds. Without MODEL a random Llama of 100M parameters is made.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [MODEL] --rounds 5
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import generation, text
from transcoder.runtime.device import shutdown
from transcoder.runtime.session import Chosen, Conversation, Request, open_model, vocabulary_of

SHAPE = {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 12}
SHAPE |= {"num_key_value_heads": 4, "vocab_size": 16000, "max_position_embeddings": 2048}
LARGER = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 20, "num_attention_heads": 16}


def make_model(folder: Path, shape: dict[str, int], dtype: str) -> Path:
    """A random Llama without an end token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(**shape, eos_token_id=None, bos_token_id=None, tie_word_embeddings=False)
    LlamaForCausalLM(config).to(getattr(torch, dtype)).save_pretrained(folder)
    return folder


def ours(model: Any, config: dict[str, Any], ids: tuple[int, ...], count: int) -> list[int]:
    """Tokens of the Megatron model."""
    conversation = Conversation(model, config, Request("", ids), len(ids) + count, cached=True)
    return [step.token for step in generation.greedy(conversation, text.Habits(frozenset()), count)]


def theirs(model: Any, ids: tuple[int, ...], count: int) -> list[int]:
    """Tokens of transformers."""
    tokens = torch.tensor([ids], device=model.device)
    out = model.generate(
        tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, min_new_tokens=count, do_sample=False
    )
    return out[0, len(ids) :].tolist()


def timed(work: Callable[[], list[int]]) -> tuple[list[int], float]:
    """The tokens, and how many came a second."""
    started = time.perf_counter()
    tokens = work()
    return tokens, len(tokens) / (time.perf_counter() - started)


def compare(folder: Path, options: argparse.Namespace) -> float:
    """Print both speeds. Returns the ratio of the best rounds."""
    from transformers import AutoModelForCausalLM

    config, device = read_config(folder), options.device
    model = open_model(config, Chosen(folder, folder, Mesh(), options.dtype, device))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    ids = tuple(torch.randint(vocabulary_of(config), (options.prompt,), generator=generator).tolist())
    works = {
        "transformers": lambda: theirs(reference, ids, options.tokens),
        "megatron-core": lambda: ours(model, config, ids, options.tokens),
    }
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(options.rounds + 1):  # the first is not counted
        found = {name: timed(work) for name, work in works.items()}
        for name, (_, speed) in found.items():
            speeds[name] += [speed] if number else []
    for name, rates in speeds.items():
        print(f"{name:<14} best {max(rates):7.2f}  median {statistics.median(rates):7.2f} tokens/s")
    same = found["transformers"][0] == found["megatron-core"][0]
    ratio = max(speeds["megatron-core"]) / max(speeds["transformers"])
    print(
        f"ratio {ratio:.2f}, {'the same' if same else 'DIFFERENT'} tokens, {torch.get_num_threads()} threads, {device}"
    )
    return ratio


def main() -> None:
    """Parse, make a model if none is given, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--larger", action="store_true", help="make a model of 1.1 billion parameters")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        shape = SHAPE | (LARGER if options.larger else {})
        compare(options.model or make_model(Path(folder), shape, options.dtype), options)
    shutdown()


if __name__ == "__main__":
    main()
