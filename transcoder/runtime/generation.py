"""Greedy generation: requests from a user's words, the loop that all ranks walk together, and what is printed."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from transcoder.errors import UsageError
from transcoder.hfconfig import read_config
from transcoder.mesh import Mesh
from transcoder.runtime import images, text
from transcoder.runtime.config import is_multimodal
from transcoder.runtime.model import reference_of
from transcoder.runtime.process import place, shared
from transcoder.runtime.session import (
    Chosen,
    Conversation,
    Request,
    check_images,
    choose_dtype,
    context_of,
    last_stage,
    open_model,
    ran,
    speaks,
    vocabulary_of,
)
from transcoder.runtime.vision import merge_size, token_count
from transcoder.runtime.voice import Voice

SHOWN_STEPS = 5
TOP = 5
RULE = "=" * 39
IMAGE_PLACE, PATCH = "<|vision_start|><|image_pad|><|vision_end|>", "<|image_pad|>"
DESCRIBE = "Describe this image."


@dataclass(frozen=True)
class Asked:
    """What the user asked for."""

    prompts: tuple[str, ...]
    images: tuple[str, ...] = ()
    chat: bool = False
    limit: int = 20
    cached: bool = True
    verbose: bool = False


@dataclass(frozen=True)
class Step:
    """One token more. output: the model's logits, scores: what the token was chosen by; on the last stage alone."""

    number: int
    token: int
    output: Any = None
    scores: Any = None


def penalised(scores: Any, ids: Sequence[int], penalty: float) -> Any:
    """Scores [vocabulary] in float32, lowered for tokens that are already there, as transformers does."""
    scores = scores.float()
    if penalty == 1.0:
        return scores
    index = torch.tensor(sorted(set(ids)), device=scores.device)
    there = scores[index]
    return scores.index_copy(0, index, torch.where(there < 0, there * penalty, there / penalty))


def greedy(conversation: Conversation, habits: text.Habits, limit: int) -> Iterator[Step]:
    """Tokens until one ends the text or `limit` are there; every rank sees the same."""
    for number in range(limit):
        output, scores, token = conversation.logits(), None, 0
        if last_stage():
            scores = penalised(output[0, -1], conversation.ids, habits.penalty)
            token = int(scores.argmax())  # of equals the lowest, on every rank
        token = conversation.agree(token)
        yield Step(number, token, output, scores)
        if token in habits.ends:
            return


def make_requests(asked: Asked, folder: Path, config: dict[str, Any], tokenizer: Any) -> list[Request]:
    """Every prompt as tokens and patches. Raises UsageError and InputError."""
    if asked.images and not is_multimodal(config):
        raise UsageError("--image_path: this model reads text only", kind="image")
    pixels, grids = images.prepare(asked.images, images.read_settings(folder)) if asked.images else (None, ())
    found = []
    for prompt in asked.prompts:
        words, templated = _words(asked, prompt, tokenizer)
        spread = _spread(words, [token_count(grid, merge_size(config)) for grid in grids])
        ids = text.encode(tokenizer, spread, templated=templated, vocabulary=vocabulary_of(config))
        text.check_length(len(ids), context_of(config))
        if is_multimodal(config):
            check_images(config, ids, grids)
        found.append(Request(prompt, ids, asked.images, pixels, grids))
    return found


def _words(asked: Asked, prompt: str, tokenizer: Any) -> tuple[str, bool]:
    """The whole input, and whether it brings its special tokens along. Images ask for the template if there is one."""
    count = len(asked.images)
    if count and PATCH in prompt:
        return prompt, True
    if asked.chat or (count and tokenizer.chat_template):
        return text.chat(tokenizer, prompt, count), True
    return IMAGE_PLACE * count + prompt, False


def _spread(words: str, counts: Sequence[int]) -> str:
    """Each image's place repeated once for each of its tokens. Raises UsageError when places and images differ."""
    first, *rest = words.split(PATCH) if counts else [words]
    if len(rest) != len(counts):
        raise UsageError(f"{len(counts)} images for {len(rest)} places in the prompt", kind="image")
    return first + "".join(PATCH * count + part for count, part in zip(counts, rest, strict=True))


def step_lines(step: Step, tokenizer: Any) -> Iterator[str]:
    """What is printed of a step."""
    values, ids = step.scores.topk(min(TOP, len(step.scores)))
    top = [(text.decode(tokenizer, [i]), round(v, 4)) for i, v in zip(ids.tolist(), values.tolist(), strict=True)]
    yield f"Generation step {step.number}"
    yield f"Step {step.number}: output shape={step.output.shape}, var={float(step.output.float().var()):.4f}"
    yield f"Top {TOP}: {top}"
    yield f"Selected: {text.decode(tokenizer, [step.token])!r} (id={step.token})"


def final_lines(request: Request, generated: str) -> Iterator[str]:
    """The block at the end."""
    yield "======== GENERATED TEXT OUTPUT ========"
    if request.images:
        yield f"Image: {', '.join(request.images)}"
    yield f"Prompt: {request.prompt}"
    yield f"Generated: {generated}"
    yield RULE


class Printer:
    """The voice of the rank that prints; all others have a silent one."""

    def __init__(self, tokenizer: Any, request: Request, verbose: bool, streams: bool = True) -> None:
        self.tokenizer, self.request, self.verbose = tokenizer, request, verbose
        self.pieces = text.Pieces(tokenizer) if streams and sys.stdout.isatty() and not verbose else None
        self.ids = list(request.ids)
        self.streamed = False

    def step(self, step: Step) -> None:
        """The lines of the first steps; after them, on a terminal, the text as it comes."""
        self.ids.append(step.token)
        if self.verbose or step.number < SHOWN_STEPS:
            _say(line + "\n" for line in step_lines(step, self.tokenizer))
        elif self.pieces is not None:
            fresh = [step.token] if self.streamed else self.ids
            self.streamed = True
            _say([self.pieces.add(fresh)])

    def end(self) -> None:
        """The final block."""
        _say(["\n"] if self.streamed else [])
        _say(line + "\n" for line in final_lines(self.request, text.decode(self.tokenizer, self.ids)))


def _say(parts: Iterable[str]) -> None:
    """Print at once; when nobody reads any more, to nowhere, since other ranks count on this one."""
    try:
        for part in parts:
            sys.stdout.write(part)
        sys.stdout.flush()
    except BrokenPipeError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def warnings_of(asked: Asked, requests: Sequence[Request], context: int) -> Iterator[str]:
    """What the user should know before the first token."""
    longest = max(len(request.ids) for request in requests)
    if longest + asked.limit > context:
        yield f"stopping at {context} tokens, where the model's context ends"


def answer(
    model: Any, config: Mapping[str, Any], request: Request, habits: text.Habits, asked: Asked
) -> Iterator[Step]:
    """The steps of one request."""
    limit = min(asked.limit, context_of(config) - len(request.ids))
    conversation = Conversation(model, config, request, len(request.ids) + limit, asked.cached)
    yield from greedy(conversation, habits, limit)


def run(
    asked: Asked, hf_model: str | None, megatron: str | None, mesh: Mesh, options: Mapping[str, Any], voice: Voice
) -> int:
    """Build, load, answer every prompt, tell. options: dtype, device and exact."""
    started, warnings = time.monotonic(), list[str]()
    folder, weights = locate(hf_model, megatron)
    config = read_config(folder)
    dtype = choose_dtype(config, options["dtype"], options["device"], options["exact"])
    tokenizer = text.load_tokenizer(folder)
    requests = make_requests(asked, folder, config, tokenizer) if place().rank == 0 else []
    chosen = Chosen(folder, weights, mesh, dtype, options["device"], options["exact"])
    model = open_model(config, chosen, warnings.extend)
    requests, habits = shared((requests, text.read_habits(folder, config)))
    loud, answers = speaks(), list[dict[str, Any]]()
    warnings += warnings_of(asked, requests, context_of(config))
    voice.warn(warnings if loud else ())
    for request in requests:
        printer = Printer(tokenizer, request, asked.verbose, voice.progress) if loud and voice.speaks else None
        tokens = []
        for step in answer(model, config, request, habits, asked):
            tokens.append(step.token)
            if printer:
                printer.step(step)
        if printer:
            printer.end()
        answers.append(as_json(request, tokens, tokenizer))
    if loud:
        voice.tell(ran(config, chosen, started, warnings) | {"answers": answers})
    return 0


def as_json(request: Request, tokens: list[int], tokenizer: Any) -> dict[str, Any]:
    """An answer as `--json` tells it; the text has prompt and special tokens, as the printed one."""
    whole = text.decode(tokenizer, [*request.ids, *tokens])
    table = {"prompt": request.prompt, "images": list(request.images), "text": whole}
    return {**table, "prompt_tokens": list(request.ids), "tokens": tokens}


def locate(hf_model: str | None, megatron: str | None) -> tuple[Path, Path]:
    """The directory of config and tokenizer, and that of the weights. Raises UsageError and InputError."""
    if hf_model is None and megatron is None:
        raise UsageError("give --hf_model_path, --megatron_model_path or both", kind="usage")
    weights = Path(megatron if megatron is not None else str(hf_model))
    return (Path(hf_model) if hf_model is not None else reference_of(weights)), weights
