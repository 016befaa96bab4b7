"""The backward pass of a prompt's loss over all ranks, as megatron-core differentiates its model."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu

from transcoder.runtime import reference
from transcoder.runtime.model import stage_forward


class _Boundary:
    """What a stage of a pipeline is given, ready to have a gradient, and what it gives, during one forward."""

    def __init__(self, stage: Any) -> None:
        self.input: Any = None
        self.output: Any = None
        self._stage, self._handles = stage, list[Any]()

    def __enter__(self) -> _Boundary:
        self._handles.append(self._stage.register_forward_pre_hook(self._before))
        self._handles.append(self._stage.register_forward_hook(self._after))
        return self

    def __exit__(self, *_error: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _before(self, stage: Any, _inputs: Any) -> None:
        if not stage.pre_process:
            self.input = stage.decoder.input_tensor.requires_grad_()

    def _after(self, _stage: Any, _inputs: Any, output: Any) -> None:
        self.output = output


def differentiate(stage: Any, ids: tuple[int, ...]) -> None:
    """Give every weight of this stage the gradient of the prompt's mean next-token loss; every rank calls it."""
    tokens = torch.tensor([ids], device=next(stage.parameters()).device)
    with torch.enable_grad(), _Boundary(stage) as boundary:
        logits = stage_forward.__wrapped__(stage, tokens)
    if logits is not None:
        reference.next_token_loss(logits[0], ids).backward()
    else:
        gradient = torch.empty_like(boundary.output)
        dist.recv(gradient, mpu.get_pipeline_model_parallel_next_rank())
        boundary.output.backward(gradient)
    if boundary.input is not None:
        dist.send(boundary.input.grad, mpu.get_pipeline_model_parallel_prev_rank())
