"""Keys and values of the tokens that a stage has seen, and the decoding steps recorded over them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transcoder.errors import UsageError
from transcoder.runtime.decoding import Recorded, attending


class KVCache:
    """Rotated keys and values of every layer of this stage, for `batch` sequences of at most `length` tokens.

    `used` counts the tokens that it holds; `stage_forward` adds those that it is given. `reset` empties it.
    """

    def __init__(self, model: Any, batch: int, length: int) -> None:
        self.length, self.used = length, 0
        self.recorded: Recorded | None = None
        self.warm = False  # whether a step was taken that could have been recorded
        self._batch, self._model = batch, model
        self._memory: dict[int, tuple[Any, Any]] = {}

    def reset(self) -> None:
        """Forget every token; the memory is kept."""
        self.used = 0

    def _layer(self, number: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Memory of a layer, [batch, heads, length, size] each, made when first needed."""
        if number not in self._memory:
            shapes = [(self._batch, like.shape[2], self.length, like.shape[3]) for like in (key, value)]
            self._memory[number] = key.new_empty(shapes[0]), value.new_empty(shapes[1])
        return self._memory[number]

    def extended(self, number: int, key: Any, value: Any) -> tuple[Any, Any]:
        """Store keys and values [s, b, heads, size] behind those of a layer; all of them, in the same layout."""
        last = self.used + key.shape[0]
        found = []
        for memory, new in zip(self._layer(number, key, value), (key, value), strict=True):
            memory[:, :, self.used : last] = new.permute(1, 2, 0, 3)
            found.append(memory[:, :, :last].permute(2, 0, 1, 3))
        return found[0], found[1]

    @contextmanager
    def growing(self, count: int) -> Iterator[None]:
        """`count` tokens more once this is left. Raises UsageError when they do not fit."""
        if self.used + count > self.length:
            message = f"{self.used} + {count} tokens do not fit a cache of {self.length}"
            raise UsageError(message, kind="length")
        yield
        self.used += count

    @contextmanager
    def attached(self, count: int) -> Iterator[None]:
        """Let the model's attention see what is cached during one forward of `count` tokens. Raises UsageError."""

        def attend(core: Any, number: int, query: Any, key: Any, value: Any, *rest: Any, **options: Any) -> Any:
            return core(query, *self.extended(number, key, value), *rest, **options)

        with self.growing(count), attending(self._model, attend):
            yield
