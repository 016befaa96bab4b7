"""What the commands say: phrases that scripts around Megatron grep for, progress, and when each is silent."""

from __future__ import annotations

import io
import os
import pty
import re
import subprocess
from pathlib import Path

import pytest
from command_line import EXAMPLE, PATIENCE, command_of, succeed, transcode

import transcoder
from transcoder import progress
from transcoder.progress import Bar, Progress
from transcoder.recipes import registry

SLOW = """
import time
from transcoder.progress import Tally
moved = Tally.moved
Tally.moved = lambda self, size: (moved(self, size), time.sleep(0.02))
"""
SIZES = ["Tensor parallel size", "Pipeline parallel size", "Expert parallel size", "Expert tensor parallel size"]
ALL_BUT_NORMS = 1_000_576 - 9 * 128
WRITTEN = "Success: All tensors from the original checkpoint were written."


def _in_order(text: str, phrases: list[str]) -> None:
    lines = iter(text.splitlines())
    missing = [phrase for phrase in phrases if not any(phrase in line for line in lines)]
    assert missing == [], text


def _import_phrases(dst: Path, tp: int, pp: int) -> list[str]:
    share = ALL_BUT_NORMS // tp + 9 * 128
    return [
        f"🔄 Starting import: {EXAMPLE} -> {dst}",
        "📥 Loading HuggingFace model",
        *(f"{label}: {size}" for label, size in zip(SIZES, (tp, pp, 1, 1), strict=True)),
        *(
            f" > number of parameters on (tensor, pipeline) model parallel rank ({rank}, 0): {share}"
            for rank in range(tp)
            if pp == 1
        ),
        f"Loading from {EXAMPLE} … 100% (27/27) LlamaBridge",
        f"successfully saved checkpoint from iteration       0 to {dst} [ t 1/{tp}, p 1/{pp} ]",
        f"✅ Successfully imported model to: {dst}",
        "📁 Checkpoint structure",
        "iter_0000000/",
        "latest_checkpointed_iteration.txt",
        "latest_train_state.pt",
        "release",
    ]


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (2, 2)])
def test_hf2mcore_says_the_phrases_of_an_import(tmp_path: Path, tp: int, pp: int) -> None:
    done = succeed("hf2mcore", EXAMPLE, tmp_path / "mcore", "--tp", tp, "--pp", pp)
    _in_order(done.out, _import_phrases(tmp_path / "mcore", tp, pp))


def test_import_says_the_same_as_hf2mcore(tmp_path: Path) -> None:
    one = succeed("hf2mcore", EXAMPLE, "mcore", cwd=tmp_path)
    two = succeed("import", "--hf-model", EXAMPLE, "--megatron-path", "mcore", "--overwrite", cwd=tmp_path)
    assert two.out == one.out


def test_parameters_on_the_ranks_of_a_pipeline_add_up(tmp_path: Path) -> None:
    text = succeed("hf2mcore", EXAMPLE, tmp_path / "mcore", "--pp", 3).out
    found = re.findall(r"^ > number of parameters on \(tensor, pipeline\) .* rank \(0, (\d)\): (\d+)$", text, re.M)
    assert [stage for stage, _ in found] == ["0", "1", "2"]
    assert sum(int(count) for _, count in found) == 1_000_576


def test_the_saved_iteration_is_right_aligned(tmp_path: Path) -> None:
    text = succeed("hf2mcore", EXAMPLE, tmp_path / "mcore", "--iteration", 1234).out
    assert f"successfully saved checkpoint from iteration    1234 to {tmp_path / 'mcore'} [ t 1/1, p 1/1 ]" in text
    assert f"{tmp_path / 'mcore' / 'iter_0001234'}" in text.splitlines()[-2]


def test_the_last_lines_of_an_import_load_it_by_its_real_path(tmp_path: Path) -> None:
    last = succeed("hf2mcore", EXAMPLE, "sub/mcore", cwd=tmp_path).out.splitlines()[-4:]
    root, folder = tmp_path / "sub" / "mcore", tmp_path / "sub" / "mcore" / "iter_0000000"
    assert [line.split("  ")[1].strip() for line in last] == ["Megatron-LM", "Megatron Bridge", "verl", "slime"]
    assert f"--load {root} --use-checkpoint-args" in last[0]
    assert "--bf16" in last[0]
    assert f"checkpoint.pretrained_checkpoint={root}," in last[1]
    assert f"load_megatron_model('{folder}')" in last[1]
    assert last[2].endswith(f"actor_rollout_ref.actor.megatron.dist_checkpointing_path={folder}")
    assert "use_dist_checkpointing=True" in last[2]
    assert f"--hf-checkpoint {EXAMPLE} --ref-load {root}" in last[3]
    assert folder.is_dir()


def test_mcore2hf_says_the_phrases_of_an_export(tmp_path: Path, mcore: Path) -> None:
    done = succeed("mcore2hf", mcore, tmp_path / "hf")
    expected = ["Converting to HuggingFace … 100% (27/27) LlamaBridge", f"Saving HF-ckpt in {tmp_path / 'hf'}..."]
    _in_order(done.out, [f"{mcore} -> {tmp_path / 'hf'}", *expected, WRITTEN])


def test_export_says_the_same_as_mcore2hf(tmp_path: Path, mcore: Path) -> None:
    one = succeed("mcore2hf", mcore, "hf", cwd=tmp_path)
    options = ["--hf-model", EXAMPLE, "--megatron-path", mcore, "--hf-path", "hf", "--no-progress"]
    assert succeed("export", *options, "--overwrite", cwd=tmp_path).out == one.out


def _table(text: str) -> list[list[str]]:
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if line.split() == ["Hugging", "Face", "Weights", "Verification"])
    assert re.split(r"\s{2,}|(?<=Device) ", lines[start + 1]) == [
        "Weight Name",
        "Shape",
        "DType",
        "Device",
        "Matches Original",
    ]
    return [re.split(r"\s{2,}", line) for line in lines[start + 2 : start + 2 + 39]]


@pytest.mark.parametrize("names", [["roundtrip"], ["roundtrip", "--tp", "2", "--pp", "2"]])
def test_roundtrip_says_sizes_counts_the_table_and_success(names: list[str]) -> None:
    done = succeed(*names, "--hf-model-id", EXAMPLE)
    sizes = [int(word) for word in names if word.isdigit()] or [1, 1]
    labels = [f"{label}: {size}" for label, size in zip(SIZES, [*sizes, 1, 1], strict=True)]
    counts = [f"Loading from {EXAMPLE} … 100% (27/27) LlamaBridge", "Converting to HuggingFace … 100% (27/27) LlamaBr"]
    _in_order(done.out, [*labels, *counts, "Hugging Face Weights Verification", WRITTEN])
    rows = _table(done.out)
    assert {tuple(row[2:]) for row in rows} == {("bfloat16", "cpu", "✅")}
    catalog = transcoder.open_checkpoint(EXAMPLE)
    expected = {name: "(" + ", ".join(map(str, spec.shape)) + ")" for name, spec in catalog.items()}
    assert {row[0]: row[1] for row in rows} == expected


def test_roundtrip_says_where_it_wrote(tmp_path: Path) -> None:
    done = succeed("roundtrip", "--hf-model-id", EXAMPLE, "--output-dir", tmp_path)
    _in_order(
        done.out, ["Hugging Face Weights Verification", f"Saving HF-ckpt in {tmp_path / EXAMPLE.name}...", WRITTEN]
    )


def test_architectures_are_counted_and_numbered() -> None:
    lines = succeed("architectures").out.splitlines()
    assert lines[0] == f"✅ Found {len(registry())} supported model architecture(s):"
    numbered = [line.split(".", 1) for line in lines[1 : len(registry()) + 1]]
    assert [int(number) for number, _ in numbered] == list(range(1, len(registry()) + 1))
    assert [text.split()[0] for _, text in numbered] == sorted(registry())
    assert "transcode hf2mcore" in lines[-1]


@pytest.mark.parametrize("command", ["hf2mcore", "mcore2hf", "roundtrip", "verify", "check", "plan", "inspect"])
def test_quiet_silences_every_line_but_warnings_and_errors(tmp_path: Path, mcore: Path, command: str) -> None:
    lines = {
        "hf2mcore": [EXAMPLE, tmp_path / "new"],
        "mcore2hf": [mcore, tmp_path / "new"],
        "verify": [EXAMPLE, mcore],
        "check": [mcore],
    }
    done = succeed(command, *lines.get(command, [EXAMPLE]), "--quiet")
    assert (done.out, done.err) == ("", "")
    failed = transcode(command, *[tmp_path / "absent"] * len(lines.get(command, [1])), "--quiet")
    assert failed.out == ""
    assert failed.err.startswith("error: ")


def test_warnings_are_marked_stay_when_quiet_and_go_with_the_level() -> None:
    warned = succeed("check", EXAMPLE, "--quiet")
    assert (warned.out, warned.err[:9]) == ("", "warning: ")
    assert succeed("check", EXAMPLE, "--log-level", "error").err == ""
    silent = succeed("check", EXAMPLE, "--json")
    assert silent.err == ""
    assert f"warning: {silent.report['warnings'][0]}\n" == warned.err


def _on_a_terminal(line: list[str | Path]) -> tuple[str, str]:
    """stdout, and what a terminal at stderr is sent."""
    main, side = pty.openpty()
    process = subprocess.Popen(
        [*command_of(SLOW), *map(str, line)], stdout=subprocess.PIPE, stderr=side, stdin=subprocess.DEVNULL, text=True
    )
    os.close(side)
    shown = _drained(main)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, shown
    return out, shown


def _drained(terminal: int) -> str:
    parts = []
    try:
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    except OSError:  # how Linux says that nobody holds the other end any more
        pass
    finally:
        os.close(terminal)
    return b"".join(parts).decode()


def test_a_terminal_is_shown_a_bar_that_is_taken_away_at_the_end(tmp_path: Path) -> None:
    out, shown = _on_a_terminal(["hf2mcore", EXAMPLE, tmp_path / "mcore", "--workers", "1"])
    states = [state for state in shown.split("\r") if "importing" in state]
    assert len(states) > 2
    pattern = r"importing +\d+% \(\d+/27\) \d+\.\d MB/s, \d+ s left\x1b\[K"
    assert [state for state in states if not re.fullmatch(pattern, state)] == []
    shares = [int(state.split()[1].rstrip("%")) for state in states]
    assert shares == sorted(shares)
    assert shown.endswith("\r\x1b[K")
    assert "importing" not in out
    assert "\x1b" not in out


@pytest.mark.parametrize("option", ["--no-progress", "--quiet"])
def test_a_terminal_is_shown_nothing_when_progress_is_unwanted(tmp_path: Path, option: str) -> None:
    out, shown = _on_a_terminal(["hf2mcore", EXAMPLE, tmp_path / "mcore", option])
    assert shown == ""
    assert ("🔄 Starting import" in out) == (option == "--no-progress")


class _Clock:
    """Time that stands still until it is told."""

    def __init__(self) -> None:
        self.now = 100.0

    def monotonic(self) -> float:
        """The present."""
        return self.now


class _Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        """Always."""
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> _Clock:
    """The clock that the progress module sees."""
    clock = _Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _states(bar: Bar, clock: _Clock, step: float, count: int) -> None:
    for number in range(1, count + 1):
        clock.now = 100.0 + number * step
        bar(Progress(number * 10**6, count * 10**6, number, count))


def test_a_file_is_written_a_line_every_ten_seconds(clock: _Clock) -> None:
    stream = io.StringIO()
    bar = Bar("importing", stream)
    _states(bar, clock, 1.0, 25)
    bar.close()
    assert stream.getvalue() == (
        "importing  40% (10/25) 1.0 MB/s, 15 s left\nimporting  80% (20/25) 1.0 MB/s, 5 s left\n"
    )


def test_a_short_run_writes_no_line_to_a_file(clock: _Clock) -> None:
    stream = io.StringIO()
    bar = Bar("importing", stream)
    _states(bar, clock, 0.5, 19)
    bar.close()
    assert stream.getvalue() == ""


def test_a_terminal_is_written_in_place_ten_times_a_second(clock: _Clock) -> None:
    stream = _Terminal()
    bar = Bar("exporting", stream)
    _states(bar, clock, 0.0625, 8)
    bar.close()
    assert stream.getvalue().count("\r") == 4 + 1
    assert "\n" not in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")


def test_time_left_is_unknown_before_anything_moved() -> None:
    assert progress.line(Progress(0, 100, 0, 9), 5.0) == "  0% (0/9) 0.0 MB/s, time left unknown"


def test_an_empty_model_is_done_at_once() -> None:
    assert progress.line(Progress(0, 0, 0, 0), 0.0).startswith("100% (0/0)")
