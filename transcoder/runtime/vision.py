"""Qwen2.5-VL: the vision tower of transformers before a Megatron decoder, and the three-row positions of its tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

import torch
from megatron.core.transformer.module import MegatronModule

from transcoder.errors import InputError, Problem, refuse
from transcoder.runtime.images import Grid

Triple = tuple[int, int, int]  # time, row and column of a token


def image_token(config: Mapping[str, Any]) -> int:
    """The id that stands for a patch of an image."""
    return int(config.get("image_token_id", 151655))


def merge_size(config: Mapping[str, Any]) -> int:
    """How many patches a token covers along each side."""
    return int((config.get("vision_config") or {}).get("spatial_merge_size", 2))


def token_count(grid: Grid, merge: int) -> int:
    """Tokens of one image.

    >>> token_count((1, 10, 16), 2)
    40
    """
    return grid[0] * grid[1] * grid[2] // merge**2


def _runs(ids: Sequence[int], token: int) -> Iterator[tuple[bool, int]]:
    """(whether they are an image's, how many) for each run of equal kind."""
    for image, run in groupby(ids, key=lambda number: number == token):
        yield image, sum(1 for _ in run)


def rope_positions(ids: Sequence[int], grids: Sequence[Grid], token: int, merge: int) -> list[Triple]:
    """Where each token stands. Text counts up; an image spreads from there, and text goes on after its longer side.

    >>> rope_positions([7, 9, 9, 8], [(1, 2, 4)], token=9, merge=2)
    [(0, 0, 0), (1, 1, 1), (1, 1, 2), (3, 3, 3)]
    """
    found: list[Triple] = []
    start, images = 0, iter(grids)
    for image, count in _runs(ids, token):
        while count > 0:
            grid = next(images, None) if image else None
            if image and (grid is None or token_count(grid, merge) > count):
                raise _unequal(ids, grids, token, merge)
            spread = _image(grid, merge) if grid else [(i, i, i) for i in range(count)]
            found += [(start + t, start + row, start + column) for t, row, column in spread]
            start += max(grid[1], grid[2]) // merge if grid else count
            count -= len(spread)
    if next(images, None) is not None:
        raise _unequal(ids, grids, token, merge)
    return found


def _image(grid: Grid, merge: int) -> list[Triple]:
    frames, rows, columns = grid[0], grid[1] // merge, grid[2] // merge
    return [(t, row, column) for t in range(frames) for row in range(rows) for column in range(columns)]


def _unequal(ids: Sequence[int], grids: Sequence[Grid], token: int, merge: int) -> InputError:
    needed = sum(token_count(grid, merge) for grid in grids)
    problem = Problem(expected=f"{needed} for {len(grids)} images", found=str(list(ids).count(token)))
    return refuse("image", "the prompt's image tokens do not fit the images", [problem])


class Positions:
    """The three rows of positions of a text that grows."""

    def __init__(self, prompt: Sequence[Triple]) -> None:
        self.prompt = list(prompt)
        self.following = max(map(max, self.prompt)) + 1

    def between(self, start: int, stop: int, device: Any) -> Any:
        """Positions [3, 1, stop - start] of the tokens with these indices."""
        behind = self.following - len(self.prompt)
        found = [self.prompt[i] if i < len(self.prompt) else (i + behind,) * 3 for i in range(start, stop)]
        return torch.tensor(found, device=device).T[:, None]


def make_tower(config: Mapping[str, Any], dtype: Any, device: Any) -> Any:
    """The vision tower, parameters unset; its rotary buffers stay in float32."""
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

    with _unfilled():
        tower = Tower._from_config(Qwen2_5_VLVisionConfig(**config["vision_config"]))
    for parameter in tower.parameters():
        parameter.data = parameter.data.to(dtype)
    return tower.to(device).eval()


def _unfilled() -> Any:
    """A context in which transformers' models get no random weights, whose numbers would take seconds."""
    try:
        from transformers.initialization import no_init_weights
    except ImportError:  # transformers 4
        from transformers.modeling_utils import no_init_weights
    return no_init_weights()


class VisionLanguage(MegatronModule):  # type: ignore[misc]
    """A pipeline stage of Qwen2.5-VL: `language_model` everywhere, `visual` on the first stage."""

    def __init__(self, language_model: Any, config: Mapping[str, Any]) -> None:
        super().__init__(language_model.config)
        self.language_model, self.image_token = language_model, image_token(config)
        device = next(language_model.parameters()).device
        if language_model.pre_process:
            self.visual = make_tower(config, language_model.config.params_dtype, device)

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def look(self, pixels: Any, grids: Sequence[Grid]) -> Any:
        """Features [tokens, hidden] of the images; None without images, or on a later stage."""
        if pixels is None or not self.language_model.pre_process:
            return None
        tower = self.visual
        device, shapes = next(tower.parameters()).device, torch.tensor(grids)
        seen = tower(pixels.to(device, tower.dtype), grid_thw=shapes.to(device))
        return getattr(seen, "pooler_output", seen)  # the tensor itself in transformers 4

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def embed(self, tokens: Any, features: Any) -> Any:
        """Embeddings [s, b, hidden] of tokens, an image's features where its tokens are."""
        embedded = self.language_model.embedding(input_ids=tokens, position_ids=None)
        places = (tokens == self.image_token)[..., None]
        filled = embedded.transpose(0, 1).masked_scatter(places, features.to(embedded.dtype))
        return filled.transpose(0, 1).contiguous()
