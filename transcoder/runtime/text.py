"""Prompts to token ids and back: tokenizer, chat template, ends of text, and the stream on a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transcoder.errors import Problem, UsageError, refuse
from transcoder.hfconfig import CONFIG_LIMIT, read_json

BROKEN = "�"  # what decoding gives for the first bytes of a character


def load_tokenizer(folder: Path) -> Any:
    """The tokenizer of a Hugging Face directory; no code of the model runs. Raises InputError."""
    from transformers import AutoTokenizer

    try:
        options = {"local_files_only": True, "trust_remote_code": False, **_unknown(folder)}
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
    except Exception as error:  # tokenizers raises bare Exception for a damaged file
        raise refuse("tokenizer", f"{folder}: cannot load the tokenizer: {error}") from error
    template = folder / "chat_template.json"  # where processors of transformers 4 keep it
    if template.is_file():
        tokenizer.chat_template = read_json(template, CONFIG_LIMIT).get("chat_template", tokenizer.chat_template)
    return tokenizer


def _unknown(folder: Path) -> dict[str, Any]:
    """A config in place of one whose type transformers does not know, as Kimi K2's: it cannot read some of these."""
    from transformers import CONFIG_MAPPING, PreTrainedConfig

    path = folder / "config.json"
    known = not path.is_file() or read_json(path, CONFIG_LIMIT).get("model_type") in CONFIG_MAPPING
    return {} if known else {"config": PreTrainedConfig()}


@dataclass(frozen=True)
class Habits:
    """What generation_config.json asks of a greedy decoder."""

    ends: frozenset[int]
    penalty: float = 1.0  # on tokens that are already there


def read_habits(folder: Path, config: Mapping[str, Any]) -> Habits:
    """End tokens of generation_config.json, else of config.json; the repetition penalty that transformers applies."""
    path = folder / "generation_config.json"
    table = read_json(path, CONFIG_LIMIT) if path.is_file() else {}
    ends = table.get("eos_token_id")
    for source in (config, config.get("text_config") or {}):
        ends = source.get("eos_token_id") if ends is None else ends
    numbers = ends if isinstance(ends, list) else [] if ends is None else [ends]
    return Habits(frozenset(int(number) for number in numbers), float(table.get("repetition_penalty") or 1.0))


def chat(tokenizer: Any, prompt: str, images: int = 0) -> str:
    """The prompt as a user's turn in the model's template. Raises UsageError when there is none."""
    if not tokenizer.chat_template:
        raise UsageError("--chat: this model has no chat template", kind="chat")
    content: Any = prompt
    if images:
        content = [*({"type": "image"} for _ in range(images)), {"type": "text", "text": prompt}]
    turns = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))


def encode(tokenizer: Any, text: str, *, templated: bool, vocabulary: int) -> tuple[int, ...]:
    """Token ids; a template brings its special tokens along. Raises UsageError or InputError."""
    ids = tuple(tokenizer(text, add_special_tokens=not templated, verbose=False).input_ids)  # we tell the length
    if not ids:
        raise UsageError("the prompt is empty: there is nothing to continue", kind="prompt")
    if max(ids) >= vocabulary:
        problem = Problem(file="tokenizer", expected=f"ids below {vocabulary}", found=str(max(ids)))
        raise refuse("tokenizer", "the tokenizer does not belong to this model", [problem])
    return ids


def check_length(count: int, context: int) -> None:
    """Raise UsageError for a prompt that leaves no room for an answer."""
    if count >= context:
        message = f"the prompt has {count} tokens and the model's context {context}: no room for an answer"
        raise UsageError(message, kind="context")


def read_prompts(path: Path) -> list[str]:
    """The lines of a file that are not empty. Raises InputError."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise refuse("batch", "cannot read the prompts", [Problem(file=str(path), message=str(error))]) from error
    prompts = [line for line in lines if line.strip()]
    if not prompts:
        raise refuse("batch", f"{path} holds no prompt: give one a line")
    return prompts


class Pieces:
    """Text of tokens as they come; a character of several tokens waits for its last."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.pending, self.shown = tokenizer, list[int](), 0

    def add(self, ids: Iterable[int]) -> str:
        """What can be shown now that was not before."""
        self.pending.extend(ids)
        text = decode(self.tokenizer, self.pending)
        if text.endswith(BROKEN):
            return ""
        fresh, self.shown = text[self.shown :], len(text)
        if text.endswith("\n"):
            del self.pending[:-1]  # one stays: some tokenizers drop the space of a first word
            self.shown = len(decode(self.tokenizer, self.pending))
        return fresh


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of token ids, special tokens included."""
    return str(tokenizer.decode(list(ids)))
