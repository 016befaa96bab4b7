"""What a comparison says, line by line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch

from transcoder.runtime import divergence, text, verdict
from transcoder.runtime.session import Request

TOP = 5


class Printer:
    """The voice of the rank that prints."""

    def __init__(self, tokenizer: Any, request: Request) -> None:
        self.tokenizer, self.request = tokenizer, request
        self.chosen: list[int] = []

    def begin(self) -> None:
        """The prompt and the shapes."""
        request = self.request
        image = ", ".join(request.images) or None
        _say([f"Processing inputs - Prompt: {request.prompt!r}, Image: {image}"])
        _say([f"Input shape: {torch.Size((1, len(request.ids)))}"])
        if request.pixels is not None:
            _say([f"Pixel values shape: {torch.Size(request.pixels.shape)}"])
        _say(["=== RUNNING HF MODEL (1-STEP) ==="])

    def side(self, name: str, logits: Any) -> None:
        """Statistics of the last position, its best token, the five best."""
        _say(["=== RUNNING MEGATRON MODEL (1-STEP) ==="] if name == "Megatron" else [])
        last = logits[-1].float()
        values, ids = last.topk(min(TOP, len(last)))
        self.chosen.append(int(ids[0]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = [(text.decode(self.tokenizer, [number]), round(value, 4)) for number, value in pairs]
        _say(
            [
                f"{name} output shape: {torch.Size((1, *logits.shape))}, {logits.dtype}",
                f"{name} logits stats - mean: {float(last.mean()):.4f}, std: {float(last.std()):.4f}",
                f"{name} next token: {int(ids[0])} ({text.decode(self.tokenizer, [int(ids[0])])!r})",
                f"{name} Top {TOP}: {top}",
            ]
        )

    def end(self, near: verdict.Measured, checks: list[verdict.Check], compared: list[divergence.Compared]) -> None:
        """The comparison; with hooks, also the first divergence."""
        _say(["=== COMPARISON ==="])
        _say(verdict.difference_lines(near, self.chosen[0] == self.chosen[1]))
        _say(verdict.verdict_lines(checks))
        _say([divergence.line(compared)] if compared else [])
        _say(["=== COMPARISON COMPLETE ==="])


def _say(lines: Iterable[str]) -> None:
    for each in lines:
        print(each, flush=True)
