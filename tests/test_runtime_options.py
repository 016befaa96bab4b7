"""The options that every command has mean the same in generate and in compare: --json, --quiet, --log-level."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import click
import jsonschema
import pytest
from command_line import EXAMPLE

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import compare_worker as worker

from transcoder.compare import compare
from transcoder.generate import generate
from transcoder.options import COMMON
from transcoder.runtime import process, text
from transcoder.runtime.device import shutdown
from transcoder.runtime.generation import Printer
from transcoder.runtime.session import Request

VALIDATOR = jsonschema.Draft202012Validator(json.loads((files("transcoder") / "schema.json").read_text("utf-8")))
COMMANDS: dict[str, click.Command] = {"generate": generate, "compare": compare}
PROMPT = "The assert statement"
MODEL = ("--hf_model_path", EXAMPLE, "--prompt", PROMPT)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model with gate and up of one layer exchanged."""
    return worker.mistaken(EXAMPLE, tmp_path_factory.mktemp("wrong") / "model", worker.exchanged("gate and up", 1))


def run(capsys: pytest.CaptureFixture[str], name: str, *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of a command, in this process."""
    capsys.readouterr()
    status = COMMANDS[name].main([str(each) for each in arguments], standalone_mode=False)
    return status, *capsys.readouterr()


def checked(out: str, name: str) -> dict[str, Any]:
    """The one object on stdout, which fits the schema."""
    report: dict[str, Any] = json.loads(out)
    assert not [error.message for error in VALIDATOR.iter_errors(report)]
    assert report["command"] == name and out.count("\n") == 1
    return report


@pytest.mark.parametrize("name", COMMANDS)
def test_both_commands_have_the_options_of_every_command(name: str) -> None:
    def told(command: Any) -> dict[str, tuple[Any, ...]]:
        return {each.name: (each.opts, each.default, each.help) for each in command.params}

    common = told(with_common())
    assert common.items() <= told(COMMANDS[name]).items() and len(common) == 4
    assert "verbose" in told(COMMANDS[name])


def with_common() -> click.Command:
    """A command that has nothing but them."""

    def nothing(**_chosen: Any) -> None:
        """Does nothing."""

    for option in COMMON:
        nothing = option(nothing)
    return click.command()(nothing)


def test_generate_tells_one_object(capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = run(capsys, "generate", *MODEL, "--max_new_tokens", 3, "--json", "--verbose")
    report = checked(out, "generate")
    (answer,) = report["answers"]
    assert (status, err, report["status"]) == (0, "", "ok")
    assert answer["prompt"] == PROMPT and len(answer["tokens"]) == 3 and answer["tokens"][0] == 26
    assert answer["text"].startswith(f"{PROMPT}:") and len(answer["prompt_tokens"]) == 4
    assert report["parallel"] == {"tp": 1, "pp": 1, "ep": 1, "etp": 1} and report["dtype"] == "float32"
    assert report["source"] == str(EXAMPLE) and report["architecture"] == "LlamaForCausalLM"


def test_compare_tells_one_object_whatever_the_verdict(
    capsys: pytest.CaptureFixture[str], wrong: Path, tmp_path: Path
) -> None:
    status, out, err = run(capsys, "compare", *MODEL, "--json")
    good = checked(out, "compare")
    assert (status, err) == (0, "") and good["comparison"]["matches"] == good["comparison"]["positions"] == 4
    assert good["comparison"]["same_token"] and all(each["holds"] for each in good["comparison"]["checks"])
    hooks = ("--enable_debug_hooks", "--log-dir", tmp_path)
    status, out, err = run(capsys, "compare", *MODEL, "--megatron_model_path", wrong, "--json", *hooks)
    bad = checked(out, "compare")
    assert status == bad["error"]["code"] == 5 and bad["status"] == "error" and bad["source"] == str(wrong)
    assert err.startswith("error: Hugging Face and Megatron differ: float32: max ") and "Traceback" not in err
    assert bad["comparison"]["first_divergence"]["module"] == "decoder.layers.1.mlp.linear_fc1"
    logs = [tmp_path / name for name in ("hf_debug_fwd", "megatron_debug_component_0_fwd")]
    logs = [log.with_name(f"{log.name}_log_1_rank_0.jsonl") for log in logs]
    status, out, _ = run(capsys, "compare", "--diff", *logs, "--json")
    again = checked(out, "compare")
    assert status == 5 and again["comparison"] == {
        name: bad["comparison"][name] for name in ("tensors", "first_divergence")
    }
    assert (again["source"], again["destination"]) == tuple(map(str, logs))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_failure_is_one_object_too(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, out, err = run(capsys, name, "--hf_model_path", tmp_path / "none", "--prompt", "p", "--json")
    report = checked(out, name)
    assert (status, report["error"]["code"], report["error"]["kind"]) == (3, 3, "not-found")
    assert err.startswith("error: ") and report["source"] == str(tmp_path / "none")


@pytest.mark.parametrize("name", COMMANDS)
def test_quiet_leaves_warnings_and_errors(name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(capsys, name, *MODEL, "--quiet", "--no_progress") == (0, "", "")
    status, out, err = run(capsys, name, "--hf_model_path", tmp_path / "none", "--prompt", "p", "--quiet")
    assert (status, out) == (3, "") and err.startswith("error: ")


def test_a_difference_is_an_error_when_quiet_as_well(capsys: pytest.CaptureFixture[str], wrong: Path) -> None:
    status, out, err = run(capsys, "compare", *MODEL, "--megatron_model_path", wrong, "--quiet")
    assert (status, out) == (5, "") and err.startswith("error: Hugging Face and Megatron differ: ")


@pytest.mark.parametrize("name", COMMANDS)
def test_debugging_shows_where_an_error_comes_from(
    name: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    model = ("--hf_model_path", tmp_path / "none", "--prompt", "p")
    assert "Traceback" not in run(capsys, name, *model, "--verbose")[2]
    assert "Traceback" in run(capsys, name, *model, "--log-level", "debug")[2]


def test_warnings_are_told_as_the_level_asks(capsys: pytest.CaptureFixture[str]) -> None:
    long = (*MODEL, "--max_new_tokens", 300)
    told = "stopping at 256 tokens, where the model's context ends"
    assert run(capsys, "generate", *long, "--quiet")[1:] == ("", f"warning: {told}\n")
    assert run(capsys, "generate", *long, "--quiet", "--log-level", "error")[1:] == ("", "")
    _, out, err = run(capsys, "generate", *long, "--json")
    assert checked(out, "generate")["warnings"] == [told] and err == ""


def test_verbose_shows_every_tensor_that_is_compared(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    hooks = ("--enable_debug_hooks", "--log-dir", tmp_path)
    _, out, _ = run(capsys, "compare", *MODEL, *hooks, "--verbose")
    assert out.count("\nequal: ") == 81 and "\ndiffers: " not in out
    assert "\nequal: lm_head <-> output_layer (output, relative error " in out


def test_without_progress_no_text_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    tokenizer, request = text.load_tokenizer(EXAMPLE), Request(PROMPT, (30,))
    assert Printer(tokenizer, request, verbose=False, streams=False).pieces is None
    assert Printer(tokenizer, request, verbose=False).pieces is not None


def test_a_usage_error_keeps_the_promise(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "hush", lambda: None)
    monkeypatch.setattr(sys, "argv", ["compare", "--json", "--tp", "two"])
    with pytest.raises(SystemExit) as stopped:
        process.enter(compare)
    report = checked(capsys.readouterr().out, "compare")
    assert stopped.value.code == report["error"]["code"] == 2 and report["error"]["kind"] == "usage"
