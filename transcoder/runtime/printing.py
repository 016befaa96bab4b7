"""What a comparison says, line by line."""

from __future__ import annotations

from typing import Any

import torch

from transcoder.runtime import divergence, text, verdict
from transcoder.runtime.session import Request
from transcoder.runtime.voice import Voice

TOP = 5


class Printer:
    """The voice of the rank that prints."""

    def __init__(self, tokenizer: Any, request: Request, voice: Voice, every: bool = False) -> None:
        self.tokenizer, self.request, self.voice, self.every = tokenizer, request, voice, every
        self.chosen: list[int] = []

    def begin(self) -> None:
        """The prompt and the shapes."""
        request = self.request
        image = ", ".join(request.images) or None
        self.voice.say([f"Processing inputs - Prompt: {request.prompt!r}, Image: {image}"])
        self.voice.say([f"Input shape: {torch.Size((1, len(request.ids)))}"])
        if request.pixels is not None:
            self.voice.say([f"Pixel values shape: {torch.Size(request.pixels.shape)}"])
        self.voice.say(["=== RUNNING HF MODEL (1-STEP) ==="])

    def side(self, name: str, logits: Any) -> None:
        """Statistics of the last position, its best token, the five best."""
        self.voice.say(["=== RUNNING MEGATRON MODEL (1-STEP) ==="] if name == "Megatron" else [])
        last = logits[-1].float()
        values, ids = last.topk(min(TOP, len(last)))
        self.chosen.append(int(ids[0]))
        pairs = zip(ids.tolist(), values.tolist(), strict=True)
        top = [(text.decode(self.tokenizer, [number]), round(value, 4)) for number, value in pairs]
        self.voice.say(
            [
                f"{name} output shape: {torch.Size((1, *logits.shape))}, {logits.dtype}",
                f"{name} logits stats - mean: {float(last.mean()):.4f}, std: {float(last.std()):.4f}",
                f"{name} next token: {int(ids[0])} ({text.decode(self.tokenizer, [int(ids[0])])!r})",
                f"{name} Top {TOP}: {top}",
            ]
        )

    def end(self, near: verdict.Measured, checks: list[verdict.Check], compared: list[divergence.Compared]) -> None:
        """The comparison; with hooks, also the first divergence."""
        self.voice.say(["=== COMPARISON ==="])
        self.voice.say(verdict.difference_lines(near, self.chosen[0] == self.chosen[1]))
        self.voice.say(verdict.verdict_lines(checks))
        self.voice.say(divergence.lines(compared, self.every))
        self.voice.say(["=== COMPARISON COMPLETE ==="])

    def conclude(
        self,
        near: verdict.Measured,
        checks: list[verdict.Check],
        compared: list[divergence.Compared],
        report: dict[str, Any],
    ) -> None:
        """What machines are told, and the error when the verdict is a failure."""
        found = verdict.as_json(near, checks) | {"same_token": self.chosen[0] == self.chosen[1]}
        report = report | {"comparison": found | (divergence.as_json(compared) if compared else {})}
        failed = [str(check) for check in checks if not check.holds]
        if failed:
            self.voice.differ(f"Hugging Face and Megatron differ: {'; '.join(failed)}", report)
        else:
            self.voice.tell(report)
