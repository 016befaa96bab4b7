"""Tokens a second of greedy decoding with a cache: megatron-core in this process, and transformers, in turn.

Both generate after the same prompt with the same weights and threads, in interleaved rounds, so that a slow moment of
the machine meets both. The ratio is of the best rounds. Without MODEL a random Llama of 100M parameters is made.

    OMP_NUM_THREADS=1 python benchmarks/generate.py [MODEL] --rounds 5
    python benchmarks/generate.py --device cuda --dtype bfloat16 --larger --profile
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from random_model import make_model

from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import generation, text
from transcoder.runtime.device import shutdown
from transcoder.runtime.session import Chosen, Conversation, Request, open_model, vocabulary_of

Work = Callable[[int], list[int]]  # of so many tokens


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


@contextmanager
def one_by_one() -> Iterator[None]:
    """Every kernel is launched by itself, as it is without CUDA graphs."""
    with patch("transcoder.runtime.model.recordable", return_value=False):
        yield


def works_of(folder: Path, options: argparse.Namespace) -> dict[str, Work]:
    """Who generates, and how."""
    from transformers import AutoModelForCausalLM

    config, device = read_config(folder), options.device
    model = open_model(config, Chosen(folder, folder, Mesh(), options.dtype, device))
    reference = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, options.dtype)).eval().to(device)
    generator = torch.Generator().manual_seed(1)
    ids = tuple(torch.randint(vocabulary_of(config), (options.prompt,), generator=generator).tolist())
    works = {
        "transformers": lambda count: theirs(reference, ids, count),
        "megatron-core": lambda count: ours(model, config, ids, count),
    }
    if device == "cuda":
        works["without graphs"] = one_by_one()(works["megatron-core"])
    return works


def timed(work: Callable[[], list[int]]) -> tuple[list[int], float]:
    """The tokens, and how many came a second."""
    started = time.perf_counter()
    tokens = work()
    return tokens, len(tokens) / (time.perf_counter() - started)


def compare(works: dict[str, Work], options: argparse.Namespace) -> dict[str, float]:
    """Print the speeds. Returns the best ones."""
    speeds: dict[str, list[float]] = {name: [] for name in works}
    for number in range(options.rounds + 1):  # the first is not counted
        found = {name: timed(lambda work=work: work(options.tokens)) for name, work in works.items()}
        for name, (_, speed) in found.items():
            speeds[name] += [speed] if number else []
    for name, rates in speeds.items():
        print(f"{name:<14} best {max(rates):7.2f}  median {statistics.median(rates):7.2f} tokens/s")
    same = len({tuple(tokens) for tokens, _ in found.values()}) == 1
    best = {name: max(rates) for name, rates in speeds.items()}
    ratio = best["megatron-core"] / best["transformers"]
    threads, words = torch.get_num_threads(), "the same" if same else "DIFFERENT"
    print(f"ratio {ratio:.2f}, {words} tokens, {threads} threads, {options.device}")
    return best


def profile(works: dict[str, Work], best: dict[str, float], tokens: int) -> None:
    """Print what one token more costs: kernels, launches, milliseconds of the GPU; and of the whole, unobserved."""
    from torch.profiler import ProfilerActivity

    print(f"{'per token':<14} {'kernels':>8} {'launches':>9} {'GPU ms':>8} {'ms':>8}")
    for name, work in works.items():
        rows = []
        for count in (tokens // 2, tokens):
            with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as found:
                work(count)
            rows.append(_counted(found.events()))
        each = [(more - less) / (tokens - tokens // 2) for less, more in zip(*rows, strict=True)]
        print(f"{name:<14} {each[0]:8.0f} {each[1]:9.0f} {each[2]:8.2f} {1e3 / best[name]:8.2f}")


def _counted(events: Any) -> tuple[int, int, float]:
    """Kernels, launches, and milliseconds in which the GPU worked."""
    kernels = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    launches = sum("Launch" in event.name and event.name.startswith("cu") for event in events)
    return len(kernels), launches, sum(event.time_range.elapsed_us() for event in kernels) / 1e3


def main() -> None:
    """Parse, make a model if none is given, compare."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--prompt", type=int, default=64, help="tokens of the prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--larger", action="store_true", help="make a model of a billion parameters")
    parser.add_argument("--profile", action="store_true", help="count kernels and launches, too")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        kind = "llama-1b" if options.larger else "llama-100m"
        works = works_of(options.model or make_model(Path(folder), kind, options.dtype), options)
        best = compare(works, options)
        if options.profile:
            profile(works, best, options.tokens)
    shutdown()


if __name__ == "__main__":
    main()
