"""Generated text: the tokens of transformers at every grid, the printed lines, and failures that end the whole job."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
from command_line import EXAMPLE
from generating import ask_transformers, command, launch, model_of, request_of, steps_of, tokens_of, work
from hf_models import make_model
from models import make_model as make_random

import transcoder
from transcoder.hfconfig import read_config
from transcoder.runtime import text
from transcoder.runtime.device import shutdown
from transcoder.runtime.generation import Printer, Request, Step
from transcoder.runtime.process import guarded
from transcoder.runtime.session import choose_dtype
from transcoder.runtime.voice import Voice

PROMPT = "The assert statement"
LIMIT = 64


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


def reference(folder: Path, dtype: Any = torch.float32) -> Any:
    """The model in transformers."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


def edited(tmp_path: Path, file: str, **values: Any) -> Path:
    """The example model with values in one of its JSON files changed."""
    folder = shutil.copytree(EXAMPLE, tmp_path / "edited")
    table = json.loads((folder / file).read_text()) | values
    (folder / file).write_text(json.dumps(table))
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_tokens_are_those_of_transformers_cached_or_not(dtype: str) -> None:
    request = request_of(EXAMPLE, PROMPT)
    model = model_of(EXAMPLE, dtype=dtype)
    want = ask_transformers(reference(EXAMPLE, getattr(torch, dtype)), request.ids, LIMIT)
    steps = steps_of(model, EXAMPLE, request, LIMIT)
    assert tokens_of(steps) == want and len(want) == LIMIT
    assert tokens_of(steps_of(model, EXAMPLE, request, LIMIT, cached=False)) == want
    assert steps[0].output.shape == (1, len(request.ids), 1024) and steps[1].output.shape == (1, 1, 1024)


def test_a_megatron_checkpoint_gives_the_same_logits(mcore: Path) -> None:
    request = request_of(EXAMPLE, PROMPT)
    ours = steps_of(model_of(EXAMPLE, mcore), EXAMPLE, request, 4)
    theirs = steps_of(model_of(EXAMPLE), EXAMPLE, request, 4)
    assert all(torch.equal(one.output, two.output) for one, two in zip(ours, theirs, strict=True))


def test_generation_stops_behind_any_of_the_end_tokens(tmp_path: Path) -> None:
    request = request_of(EXAMPLE, PROMPT)
    plain = tokens_of(steps_of(model_of(EXAMPLE), EXAMPLE, request, LIMIT))
    last = plain[9]
    folder = edited(tmp_path, "generation_config.json", eos_token_id=[1023, last])
    ended = tokens_of(steps_of(model_of(folder), folder, request, LIMIT))
    assert ended == plain[: plain.index(last) + 1] and len(ended) <= 10
    assert ended == ask_transformers(reference(folder), request.ids, LIMIT)


def test_end_tokens_come_from_the_config_when_nothing_else_names_them(tmp_path: Path) -> None:
    folder = edited(tmp_path, "config.json", eos_token_id=7)
    (folder / "generation_config.json").unlink()
    config = read_config(folder)
    assert text.read_habits(folder, config).ends == {7}
    assert text.read_habits(folder, {"text_config": {"eos_token_id": [3, 4]}}).ends == {3, 4}
    assert text.read_habits(folder, {}).ends == frozenset()


def test_a_repetition_penalty_is_applied_as_in_transformers(tmp_path: Path) -> None:
    folder = edited(tmp_path, "generation_config.json", repetition_penalty=3.0)
    request = request_of(folder, PROMPT)
    found = tokens_of(steps_of(model_of(folder), folder, request, 32))
    assert found == ask_transformers(reference(folder), request.ids, 32)
    assert found != tokens_of(steps_of(model_of(EXAMPLE), EXAMPLE, request, 32))


def test_padding_rows_of_the_vocabulary_never_win() -> None:
    model, request = model_of(EXAMPLE), request_of(EXAMPLE, PROMPT)
    model.real_vocab = 500
    assert max(tokens_of(steps_of(model, EXAMPLE, request, 16))) < 500
    model.real_vocab = 1024
    assert max(tokens_of(steps_of(model, EXAMPLE, request, 16))) >= 500


def test_the_printed_lines_and_the_final_block(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = command(capsys, "--hf_model_path", EXAMPLE, "--prompt", PROMPT, "--max-new-tokens", 7)
    assert (status, err) == (0, "")
    lines = out.splitlines()
    assert lines[0] == "Generation step 0"
    assert re.fullmatch(r"Step 0: output shape=torch\.Size\(\[1, 4, 1024\]\), var=\d+\.\d{4}", lines[1])
    assert re.fullmatch(r"Top 5: \[(\('.*', -?[\d.]+\)(, )?){5}\]", lines[2])
    assert lines[3] == "Selected: ':' (id=26)"
    assert lines[16:18] == ["Generation step 4", lines[17]] and "Generation step 5" not in out
    tokenizer = text.load_tokenizer(EXAMPLE)
    request = request_of(EXAMPLE, PROMPT)
    whole = tokenizer.decode([*request.ids, *tokens_of(steps_of(model_of(EXAMPLE), EXAMPLE, request, 7))])
    rule = "=" * 39
    block = f"======== GENERATED TEXT OUTPUT ========\nPrompt: {PROMPT}\nGenerated: {whole}\n{rule}\n"
    assert out.endswith(f"\n{block}")


def test_verbose_shows_every_step(capsys: pytest.CaptureFixture[str]) -> None:
    _, out, _ = command(capsys, "--hf-model-path", EXAMPLE, "--prompt", PROMPT, "--max_new_tokens", 7, "--verbose")
    assert out.count("Generation step ") == out.count("Selected: ") == 7


def test_a_terminal_sees_the_text_as_it_comes(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    tokenizer, ids = text.load_tokenizer(EXAMPLE), (30, 31, 32)
    printer, seen = Printer(tokenizer, Request("p", ids), verbose=False), []
    euro = tokenizer("a€ b").input_ids
    for number, token in enumerate([33] * 5 + euro):
        scores = torch.zeros(1024)
        printer.step(Step(number, token, scores[None, None], scores))
        seen.append(capsys.readouterr().out)
    assert all("Generation step" in part for part in seen[:5])
    assert "".join(seen[5:]) == tokenizer.decode([*ids, *[33] * 5, *euro])
    assert not any("�" in part for part in seen[5:]) and len([part for part in seen[5:] if part]) > 1


def test_batch_files_give_a_block_for_every_prompt(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text(f"{PROMPT}\n\nThe following\n")
    _, out, _ = command(
        capsys, "--hf_model_path", EXAMPLE, "--batch-file", tmp_path / "prompts.txt", "--max_new_tokens", 3
    )
    assert re.findall("^Prompt: (.*)$", out, re.M) == [PROMPT, "The following"]
    assert out.count("Generation step 0") == 2


def test_chat_puts_the_prompt_into_the_template(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}=>{% endif %}"
    )
    folder = edited(tmp_path, "tokenizer_config.json", chat_template=template)
    _, out, _ = command(capsys, "--hf_model_path", folder, "--prompt", "Hi", "--chat", "--max_new_tokens", 1)
    assert "\nPrompt: Hi\nGenerated: <user>Hi=>" in out


def test_the_context_ends_the_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = edited(tmp_path, "config.json", max_position_embeddings=10)
    status, out, err = command(
        capsys, "--hf_model_path", folder, "--prompt", PROMPT, "--max_new_tokens", 50, "--verbose"
    )
    assert status == 0 and out.count("Generation step") == 6
    assert err == "warning: stopping at 10 tokens, where the model's context ends\n"


def other_architecture(folder: Path) -> list[object]:
    transcoder.hf2mcore(make_model("qwen2", folder / "qwen2"), folder / "mcore", sync=False)
    return ["--hf_model_path", EXAMPLE, "--megatron_model_path", folder / "mcore"]


def too_long(folder: Path) -> list[object]:
    return ["--hf_model_path", EXAMPLE, "--prompt", "word " * 400]


def truncated(folder: Path) -> list[object]:
    damaged = shutil.copytree(EXAMPLE, folder / "damaged")
    shard = damaged / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    return ["--hf_model_path", damaged]


REFUSED: dict[str, tuple[Any, int, str]] = {
    "a missing model": (lambda folder: ["--hf_model_path", folder / "none"], 3, "none: no such directory"),
    "a missing checkpoint": (
        lambda folder: ["--hf_model_path", EXAMPLE, "--megatron_model_path", folder / "none"], 3, "none: no such",
    ),
    "another architecture": (other_architecture, 3, "linear_qkv"),
    "a truncated file": (truncated, 3, "model-00003-of-00003.safetensors"),
    "a prompt beyond the context": (too_long, 2, "the model's context 256"),
    "an empty prompt": (lambda folder: ["--hf_model_path", EXAMPLE, "--prompt", ""], 2, "the prompt is empty"),
    "more ranks than heads": (
        lambda folder: ["--hf_model_path", EXAMPLE, "--tp", 16], 2, "8 attention heads; values that fit: 1, 2, 4, 8",
    ),
    "no torchrun": (
        lambda folder: ["--hf_model_path", EXAMPLE, "--tp", 2, "--pp", 2], 2, "torchrun --nproc-per-node 4",
    ),
    "an image for a text model": (
        lambda folder: ["--hf_model_path", EXAMPLE, "--image_path", "x.png"], 2, "this model reads text only",
    ),
    "no template": (lambda folder: ["--hf_model_path", EXAMPLE, "--chat"], 2, "this model has no chat template"),
    "a missing batch file": (
        lambda folder: ["--hf_model_path", EXAMPLE, "--batch-file", folder / "none.txt"], 3, "none.txt",
    ),
    "no model": (lambda folder: [], 2, "--hf_model_path"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_is_one_clear_error(case: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments, code, words = REFUSED[case]
    given = arguments(tmp_path)
    prompt = [] if {"--prompt", "--batch-file"} & set(map(str, given)) else ["--prompt", PROMPT]
    status, out, err = command(capsys, *given, *prompt)
    assert (status, out) == (code, "")
    assert err.startswith("error: ") and words in err and "Traceback" not in err
    assert err.count("error: ") == 1


def test_the_compute_type_follows_the_device() -> None:
    config = {"text_config": {"torch_dtype": "float16"}}
    assert choose_dtype(config, None, "cpu", False) == choose_dtype(config, None, "cuda", True) == "float32"
    assert choose_dtype(config, None, "cuda", False) == "float16"
    assert choose_dtype({}, None, "cuda", False) == choose_dtype({}, "bfloat16", "cpu", True) == "bfloat16"


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("odd"), 1, "error: ValueError: odd; this is a bug"),
        (OSError(28, "No space left"), 4, "error: [Errno 28] No space left"),
        (ModuleNotFoundError("No module named 'PIL'"), 4, "pip install 'megatron-transcoder[runtime]'"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_every_failure_has_its_exit_status(
    error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    def work() -> int:
        raise error

    assert guarded(work, Voice("generate")) == code
    assert words in (err := capsys.readouterr().err) and "Traceback" not in err
    guarded(work, Voice("generate", level="debug"))
    assert ("Traceback" in capsys.readouterr().err) == (code != 130)


def test_every_grid_of_two_gives_the_tokens_of_one_and_one_rank_prints(tmp_path: Path, mcore: Path) -> None:
    random = make_random("qwen3-moe", tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(EXAMPLE / name, random)
    example = {"hf": str(EXAMPLE), "prompt": PROMPT, "limit": LIMIT}
    mixture = {"hf": str(random), "prompt": "!!", "limit": 16}
    cases = [
        {**example, "tp": 2},
        {**example, "pp": 2, "weights": str(mcore)},
        {**example, "tp": 2, "cached": False},
        {**example, "tp": 2, "exact": True},
        {**mixture, "ep": 2},
        {**mixture, "pp": 2},
    ]
    cases[-1]["command"] = ["--hf_model_path", str(EXAMPLE), "--prompt", PROMPT, "--pp", "2", "--max_new_tokens", "6"]
    found, out = launch(cases, 2, tmp_path)
    request = request_of(EXAMPLE, PROMPT)
    want = steps_of(model_of(EXAMPLE), EXAMPLE, request, LIMIT)
    assert all(result["tokens"] == tokens_of(want) and result["gap"] > 1e-3 for result in found[:4])
    assert torch.equal(torch.tensor(found[1]["logits"]).float(), want[0].output[0])
    exact = steps_of(model_of(EXAMPLE, exact=True), EXAMPLE, request, 1)[0].output[0]
    assert torch.equal(torch.tensor(found[3]["logits"]).float(), exact)
    assert not torch.equal(exact, want[0].output[0])
    alone = tokens_of(steps_of(model_of(random), random, request_of(random, "!!"), 16))
    assert all(result["tokens"] == alone for result in found[4:])
    assert out.count("Generation step 0\n") == out.count("GENERATED TEXT OUTPUT") == 1


def test_a_rank_that_fails_ends_the_job_with_one_error(tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    case = {"hf": str(EXAMPLE), "prompt": PROMPT, "limit": LIMIT, "pp": 2, "failing_rank": 1, "mark": str(mark)}
    status, out, err = work([case], 2, tmp_path)
    assert time.time() - mark.stat().st_mtime < 10
    assert (status, out) == (1, "")
    assert err.count("error: ") == err.count("error: this rank fails on purpose") == 1
    codes = set(re.findall(r"exitcode +: (-?\d+)", err))
    assert "3" in codes and codes <= {"3", "4", "-15"}  # the other lost it while waiting, or was ended
