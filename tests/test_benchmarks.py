"""The suite of measurements: its arithmetic, that it covers the table of targets, and that one group runs."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "benchmarks"))

import growing
import projection
import rows
import sources
import suite
from convert import Sample
from ratios import START, Result, exponent, line, markdown, paired, slow_rounds
from rounds import rows_of

ROOT = Path(__file__).parent.parent
# The first words of every row of the table of targets, as issue 7 has them.
DEMANDED = {
    "BF16, 2 workers", "BF16, 1 worker", "TP 8, row pieces", "one rank", "default durability", "cold source",
    "CPU seconds per GB", "MoE, ep 8", "FP8 128x128", "MXFP4", "transposes", "plan for DeepSeek-V3",
    "peak anonymous memory", "start-up", "against the peers", "cost growth",
}  # fmt: skip
MEASURED = projection.Figures(0.5, 5.0, 2.0, 1.0)


def test_a_ratio_is_taken_within_its_round_after_the_time_granted_for_starting() -> None:
    assert paired([1.05, 1.8], [1.0, 2.0], START) == [0.75, 0.75]
    assert paired([1.0, 4.0], [2.0, 2.0]) == [0.5, 2.0]


def test_rounds_whose_copy_is_slow_are_marked_and_still_counted() -> None:
    copies = [1.0, 1.1, 0.9, 1.0, 2.5]
    result = Result("", "x", "s / cp", [0.7, 0.7, 0.7, 0.9, 0.3], 0.75, slow=slow_rounds(copies))
    assert result.slow == [False, False, False, False, True]
    assert (result.median, result.quiet) == (0.7, 0.7)
    spoilt = replace(result, samples=[0.7, 0.8, 0.9, 0.9, 0.3])
    assert (spoilt.median, spoilt.verdict) == (0.8, "missed")
    assert spoilt.quiet == pytest.approx(0.85)
    assert "1 slow" in markdown([spoilt])
    assert replace(result, slow=[False] * 5).quiet is None


def test_more_is_better_only_where_the_row_says_so() -> None:
    assert [Result("", "", "", [5.0], 4.0, higher=higher).verdict for higher in (True, False)] == ["ok", "missed"]
    assert Result("", "", "", [5.0]).verdict == "-"


def test_lines_and_powers_are_those_of_the_points() -> None:
    assert line([(1, 5), (3, 9), (5, 13)]) == pytest.approx((2, 3))
    assert exponent([(1, 3), (2, 6), (8, 24)]) == pytest.approx(1)


def test_every_row_of_the_table_of_targets_is_measured() -> None:
    assert set(rows.ISSUE) == DEMANDED
    assert rows.covered() == DEMANDED
    assert set(rows.FIXED) == {*suite.RUNNERS, "peers"}


def test_targets_are_those_of_the_table() -> None:
    found = {
        (each.issue, each.source): (each.target, each.cpu, each.grid)
        for group in rows.GROUPS.values()
        for each in group
    }
    assert found[rows.DENSE, "llama-5.6g"] == found[rows.DENSE, "llama-1b"] == (0.75, 1.7, (2, 2, 1))
    assert found[rows.ONE_WORKER, "llama-1b"] == (1.1, 1.4, (2, 2, 1))
    assert found[rows.PIECES, "wide"] == (0.8, 1.7, (8, 1, 1))
    assert found[rows.PIECES, "llama-1b"] == (1.1, 2.2, (8, 1, 1))
    assert found[rows.DURABLE, "llama-5.6g"] == (1.02, None, (2, 2, 1))
    assert found[rows.COLD, "llama-1b"] == (1.1, None, (2, 2, 1))


def test_sources_have_the_sizes_and_row_pieces_that_the_table_names() -> None:
    assert sources.source_bytes("llama-1b", False) == 2_471_628_800
    assert 5.5e9 < sources.source_bytes("llama-5.6g", False) < 5.7e9
    assert 4.9e9 < sources.source_bytes(sources.MOE, False) < 10e9
    for name, least, most in (("wide", 4096, 1 << 20), ("llama-1b", 1, 2048)):
        shape, _ = sources.shape_of(name, False)
        for width in (shape.heads * shape.head_dim, shape.ffn):
            assert least <= width * 2 // 8 <= most


def test_the_disk_that_is_asked_for_fits_the_promise() -> None:
    assert suite.room([*rows.GROUPS, *rows.FIXED], False) < 25e9
    assert suite.room(["kernels"], False) < suite.room(["dense"], True) < 2e9


def test_wall_and_cpu_are_compared_with_the_copy_of_the_same_round() -> None:
    variant = rows.GROUPS["dense"][0]
    samples = {
        "cp": [Sample(1.0, 0.5, 0), Sample(4.0, 0.5, 0), Sample(1.0, 0.5, 0)],
        "hf2mcore": [Sample(1.0, 0.6, 0), Sample(3.1, 0.7, 0), Sample(1.1, 0.8, 0)],
        "mcore2hf": [Sample(1.3, 1.0, 0)] * 3,
    }
    loops = [{"2 crc": 0.5, "1 crc": 1.0}] * 3
    found = {(each.name.split(": ")[1], each.unit): each for each in rows_of(variant, samples, loops, 10**9)}
    wall = found["import", "(s - 0.3) / cp"]
    assert wall.samples == pytest.approx([0.7, 0.7, 0.8])
    assert (wall.verdict, wall.slow, wall.limit) == ("ok", [False, True, False], [0.5, 0.125, 0.5])
    assert found["import, CPU", "CPU s / those of cp"].samples == pytest.approx([1.2, 1.4, 1.6])


def test_a_tensor_costs_the_slope_of_a_round() -> None:
    walls = {"few": {"hf2mcore": [0.2, 0.3]}, "many": {"hf2mcore": [0.7, 1.3]}}
    slopes = growing.per_round(walls, "hf2mcore", lambda found: (found["many"] - found["few"]) / 10_000 * 1e6)
    assert slopes == pytest.approx([50, 100])


def test_a_projection_is_bound_by_the_slower_of_processor_and_storage() -> None:
    assert projection.seconds(MEASURED, "671B", 2, 40.0) == (472.7, "processor")
    assert projection.seconds(MEASURED, "671B", 64, 0.8) == (1680.5, "storage")
    assert projection.seconds(MEASURED, "1T", 64, 4.0)[0] == pytest.approx(2000 / 4 + 1.49 * 3, abs=0.1)
    text = projection.table(MEASURED)
    assert all(assumption in text for assumption in projection.ASSUMPTIONS)
    assert projection.figures([{"name": "x", "unit": "s", "median": 1.0}]) is None


def test_the_suite_refuses_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "room", lambda *_: 10**18)
    with pytest.raises(SystemExit, match="GB needed"):
        suite.main(["--folder", str(tmp_path), "--only", "dense"])


def test_one_group_runs_from_end_to_end(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/suite.py", "--quick", "--only", "pieces", "--rounds", "1"]
    done = subprocess.run([*command, "--folder", str(tmp_path)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "wide, TP 8, row pieces of 4 and 7 KiB, 2 workers: export" in done.stdout
    (record,) = map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines())
    walls = [row for row in record["rows"] if row["unit"] == "(s - 0.3) / cp"]
    assert len(walls) == 4
    assert all(len(row["samples"]) == len(row["limit"]) == 1 for row in walls)
    assert record["machine"]["cores"] >= 1
    assert not any((tmp_path / name).exists() for name in ("sources", "out"))
