"""`python -m transcoder.compare`: printed lines, log files, exit status, images, gradients, logs without a model."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import EXAMPLE
from vision_models import make_picture, make_vision_model

sys.path.insert(0, str(Path(__file__).parent / "megatron"))
import compare_worker as worker

from transcoder.compare import compare
from transcoder.runtime import verdict
from transcoder.runtime.device import shutdown

PROMPT = "The assert statement"
LOGS = ("hf_debug_fwd_log_1_rank_0.jsonl", "megatron_debug_component_0_fwd_log_1_rank_0.jsonl")
NUMBER = r"-?[\d.e+-]+"
LINES = (
    rf"Processing inputs - Prompt: '{PROMPT}', Image: None",
    r"Input shape: torch\.Size\(\[1, 4\]\)",
    r"=== RUNNING HF MODEL \(1-STEP\) ===",
    r"HF output shape: torch\.Size\(\[1, 4, 1024\]\), torch\.float32",
    rf"HF logits stats - mean: {NUMBER}, std: {NUMBER}",
    r"HF next token: 26 \(':'\)",
    rf"HF Top 5: \[(\('.*?', {NUMBER}\)(, )?){{5}}\]",
    r"=== RUNNING MEGATRON MODEL \(1-STEP\) ===",
    r"Megatron output shape: torch\.Size\(\[1, 4, 1024\]\), torch\.float32",
    rf"Megatron logits stats - mean: {NUMBER}, std: {NUMBER}",
    r"Megatron next token: 26 \(':'\)",
    rf"Megatron Top 5: \[(\('.*?', {NUMBER}\)(, )?){{5}}\]",
    r"=== COMPARISON ===",
    r"Token match: True",
    rf"Logits diff - max: {NUMBER}, mean: {NUMBER}",
    r"Cosine similarity: (1\.0{12}|0\.9{9}\d*)",
    r"Positions: 4, same token at 4, undecided at 0",
    rf"1 - cosine: {NUMBER}",
    rf"KL divergence - max: {NUMBER}, mean: {NUMBER}",
    rf"float32: max difference in 0\.0001 of std {NUMBER} <= {NUMBER}",
    r"Verdict: PASS",
    r"First divergence: none in 81 tensors",
    r"=== COMPARISON COMPLETE ===",
)


@pytest.fixture(scope="module", autouse=True)
def groups() -> Iterator[None]:
    """Process groups of this module are gone after it."""
    yield
    shutdown()


@pytest.fixture(scope="module")
def wrong(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example model with gate and up of one layer exchanged."""
    return worker.mistaken(EXAMPLE, tmp_path_factory.mktemp("wrong") / "model", worker.exchanged("gate and up", 2))


def command(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of `python -m transcoder.compare`, in this process."""
    capsys.readouterr()
    status = compare.main([str(each) for each in arguments], standalone_mode=False)
    return status, *capsys.readouterr()


def records(path: Path) -> list[dict[str, Any]]:
    """Every line of a log, as strict JSON."""

    def refuse(text: str) -> None:
        raise ValueError(f"{text} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_the_lines_of_a_comparison_and_its_logs(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    html = tmp_path / "divergence.html"
    status, out, err = command(
        capsys, "--hf_model_path", EXAMPLE, "--prompt", PROMPT, "--enable_debug_hooks", "--log-dir", tmp_path,
        "--html", html,
    )  # fmt: skip
    assert (status, err) == (0, "")
    for line, want in zip(out.splitlines(), LINES, strict=True):
        assert re.fullmatch(want, line), (want, line)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["divergence.html", *LOGS]
    assert html.read_text().count("<circle") == 81
    hf, megatron = (records(tmp_path / name) for name in LOGS)
    (embedding,) = (each for each in hf if each["module"] == "model.embed_tokens")
    statistics = {"name", "shape", "dtype", "device", "min", "max", "mean", "abs_sum"}
    assert all(statistics == each.keys() for each in embedding["weights"] + embedding["outputs"])
    (fc1,) = (each for each in megatron if each["module"] == "decoder.layers.3.mlp.linear_fc1")
    assert fc1["layout"] == "[s, b, h]" and fc1["outputs"][0]["shape"][:2] == [4, 1]
    parts = [(part["hf"], part["side"]) for part in fc1["parts"]]
    halves = [f"model.layers.3.mlp.{name}_proj" for name in ("gate", "up")]
    assert parts == [(half, side) for side in ("input", "output") for half in halves]


def test_a_wrong_checkpoint_is_exit_status_5_live_and_from_logs(
    wrong: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    status, out, err = command(
        capsys, "--hf_model_path", EXAMPLE, "--megatron_model_path", wrong, "--prompt", PROMPT,
        "--enable_debug_hooks", "--log-dir", tmp_path,
    )  # fmt: skip
    (line,) = re.findall("^First divergence: .*$", out, re.M)
    assert status == 5 and "\nVerdict: FAIL\n" in out and " exceeds " in out
    assert err.startswith("error: Hugging Face and Megatron differ: ") and err.count("\n") == 1
    assert line.startswith(
        "First divergence: model.layers.2.mlp.gate_proj <-> decoder.layers.2.mlp.linear_fc1 (output, relative error "
    )
    one, other = (tmp_path / name for name in LOGS)
    for logs in ((one, other), (other, one)):
        pair = line.removeprefix("First divergence: ")
        assert command(capsys, "--diff", *logs) == (5, f"{line}\n", f"error: the logs differ: {pair}\n")
    status, out, _ = command(capsys, "--diff", one, one, "--html", tmp_path / "same.html")
    assert status == 0 and out.startswith("First divergence: none in ") and (tmp_path / "same.html").exists()


def test_gradients_of_both_sides_are_logged_and_agree(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    status, _, _ = command(
        capsys, "--hf_model_path", EXAMPLE, "--prompt", PROMPT, "--enable_debug_hooks", "--backward",
        "--log-dir", tmp_path,
    )  # fmt: skip
    assert status == 0
    found = records(tmp_path / "debug_bwd_log_1_rank_0.jsonl")
    sums = {
        (each["model"], each["module"]): sum(one["abs_sum"] for one in each["weight_gradients"])
        for each in found
        if "weight_gradients" in each
    }
    parts = [sums["hf", f"model.layers.1.mlp.{name}_proj"] for name in ("gate", "up")]
    assert sums["megatron", "decoder.layers.1.mlp.linear_fc1"] == pytest.approx(sum(parts), rel=1e-4)
    assert sums["megatron", "decoder.layers.0.input_layernorm"] == pytest.approx(
        sums["hf", "model.layers.0.input_layernorm"], rel=1e-4
    )
    assert {"hf", "megatron"} == {each["model"] for each in found if "output_gradients" in each}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_image_is_compared_as_well(dtype: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = tmp_path / "vision"
    folder.mkdir()
    make_vision_model(folder)
    picture = make_picture(tmp_path / "wide.png", 64, 40)
    status, out, err = command(
        capsys, "--hf_model_path", folder, "--image_path", picture, "--prompt", "What?", "--dtype", dtype,
        "--enable_debug_hooks", "--log-dir", tmp_path,
    )  # fmt: skip
    assert (status, err) == (0, "")
    assert f"Image: {picture}\n" in out and re.search(r"^Pixel values shape: torch\.Size\(\[160, 96\]\)$", out, re.M)
    assert re.search(r"^Verdict: PASS\nFirst divergence: none in \d\d tensors$", out, re.M)


def test_bad_input_is_one_clear_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "words.jsonl").write_text("no log\n")
    (tmp_path / "other.jsonl").write_text('{"module": "a"}\n')
    model = ("--hf_model_path", EXAMPLE, "--prompt", PROMPT)
    refused: list[tuple[tuple[object, ...], int, str]] = [
        (("--prompt", "p"), 2, "--hf_model_path"),
        (("--hf_model_path", EXAMPLE), 2, "--prompt"),
        (("--hf_model_path", tmp_path / "none", "--prompt", "p"), 3, "none: no such directory"),
        ((*model, "--model_class", "NoSuchModel"), 2, "NoSuchModel"),
        ((*model, "--tp", 2), 2, "torchrun --nproc-per-node 2"),
        (("--diff", tmp_path / "none", tmp_path / "none"), 3, "none"),
        (("--diff", tmp_path / "words.jsonl", tmp_path / "words.jsonl"), 3, "words.jsonl"),
        (("--diff", tmp_path / "other.jsonl", tmp_path / "other.jsonl"), 3, "other.jsonl:1"),
    ]
    for arguments, code, words in refused:
        status, _, err = command(capsys, *arguments)
        assert status == code and err.startswith("error: ") and err.count("error: ") == 1 and words in err, arguments
        assert "Traceback" not in err


def test_a_damaged_reference_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    folder = shutil.copytree(EXAMPLE, tmp_path / "damaged")
    shard = folder / "model-00003-of-00003.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1000])
    status, _, err = command(capsys, "--hf_model_path", folder, "--prompt", PROMPT)
    assert status == 3 and err.startswith("error: ") and str(folder) in err


def test_the_cosine_is_never_above_one_and_every_position_counts() -> None:
    one = torch.randn(70, 300, generator=torch.Generator().manual_seed(4)) * 20
    same = verdict.measure(one, one)
    assert (same.largest, same.matches) == (0.0, 70) and 0 <= same.distance < 1e-12
    assert 1 - 1e-12 < same.cosine <= 1.0
    other = one.clone()
    other[69] = -other[69]
    found = verdict.measure(one, other)
    assert found.cosine == pytest.approx(-1.0) and found.matches == 69 and found.positions == 70
    assert found.kl[0] > found.kl[1] > 0 and found.largest == pytest.approx(2 * float(one[69].abs().max()))


def test_bfloat16_is_measured_by_what_it_costs_hugging_face() -> None:
    generator = torch.Generator().manual_seed(5)
    exact = torch.randn(20, 200, generator=generator)
    theirs, ours, far = (exact + 0.1 * size * torch.randn(20, 200, generator=generator) for size in (1, 1, 3))
    own = verdict.measure(exact, theirs)

    def holds(logits: torch.Tensor) -> bool:
        near, away = verdict.measure(theirs, logits), verdict.measure(exact, logits)
        return all(check.holds for check in verdict.narrow_checks("bfloat16", near, own, away))

    assert holds(theirs) and holds(theirs * 0.5 + ours * 0.5) and not holds(far)
    assert not holds(torch.full_like(exact, float("nan")))
