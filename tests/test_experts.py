"""Mixtures of experts: one Megatron checkpoint whatever the files' spelling, and evidence decides the spelling."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
from hf_models import EXPERT_KINDS, Entry, config_of, make_model, read_files, write_config, write_files

import transcoder
from transcoder import InputError, UsageError

GRIDS = ({"tp": 1}, {"tp": 2, "pp": 3, "ep": 4}, {"tp": 2, "ep": 2, "etp": 2})
LAYOUTS = ("stacked", "per-layer", "singleton")
QWEN = ("qwen3-moe", "qwen3-moe-mixed", "qwen2-moe", "olmoe")


def payloads(checkpoint: Path) -> dict[str, bytes]:
    """The weight files."""
    return {path.name: path.read_bytes() for path in (checkpoint / "iter_0000000").glob("*.distcp")}


def fused(entries: list[Entry]) -> list[Entry]:
    """The same tensors with one tensor per layer for all experts."""
    named = {entry.name: entry for entry in entries}
    found = [entry for entry in entries if ".experts." not in entry.name]
    for prefix in sorted({match[1] for name in named if (match := re.match(r"(.*\.experts\.)0\.", name))}):
        gates, ups, downs = (_numbered(named, prefix, part) for part in ("gate_proj", "up_proj", "down_proj"))
        rows, width = gates[0].shape
        halves = [gate.data + up.data for gate, up in zip(gates, ups, strict=True)]
        both = replace(gates[0], shape=(len(gates), 2 * rows, width), data=b"".join(halves))
        down = replace(downs[0], shape=(len(downs), width, rows), data=b"".join(each.data for each in downs))
        found += [replace(both, name=f"{prefix}gate_up_proj"), replace(down, name=f"{prefix}down_proj")]
    return found


def _numbered(named: dict[str, Entry], prefix: str, part: str) -> list[Entry]:
    found = {
        int(name[len(prefix) :].split(".")[0]): e
        for name, e in named.items()
        if name.endswith(f"{part}.weight") and name.startswith(prefix)
    }
    return [found[number] for number in range(len(found))]


def fused_model(kind: str, split: Path, directory: Path) -> Path:
    """The model of `split` with fused experts, in one file."""
    directory.mkdir()
    entries = [entry for part in read_files(split).values() for entry in part]
    write_config(directory, config_of(kind))
    write_files(directory, {"model.safetensors": fused(entries)})
    return directory


@pytest.mark.parametrize("kind", EXPERT_KINDS)
def test_round_trips_give_the_files_back_at_every_grid_and_dialect(kind: str, tmp_path: Path) -> None:
    source, alike = make_model(kind, tmp_path / "hf"), kind in ("qwen3-moe", "mixtral", "olmoe")
    for number, (grid, layout, norm) in enumerate(product(GRIDS, LAYOUTS[not alike :], ("te", "local"))):
        place, back = tmp_path / f"m{number}", tmp_path / f"h{number}"
        transcoder.hf2mcore(source, place, layout=layout, norm_names=norm, sync=False, **grid)
        transcoder.mcore2hf(place, back, sync=False)
        for path in source.iterdir():
            assert (back / path.name).read_bytes() == path.read_bytes(), f"{grid} {layout} {norm}: {path.name}"


@pytest.mark.parametrize("kind", QWEN)
def test_both_spellings_give_the_same_checkpoint_and_each_other(kind: str, tmp_path: Path) -> None:
    split = make_model(kind, tmp_path / "split", shards=1)
    whole = fused_model(kind, split, tmp_path / "whole")
    for number, (grid, layout) in enumerate(product(GRIDS, LAYOUTS[1:])):
        one, two = tmp_path / f"s{number}", tmp_path / f"w{number}"
        transcoder.hf2mcore(split, one, layout=layout, sync=False, **grid)
        transcoder.hf2mcore(whole, two, layout=layout, sync=False, **grid)
        assert payloads(one) == payloads(two)
        transcoder.mcore2hf(one, tmp_path / f"f{number}", expert_layout="fused", sync=False)
        assert weights(tmp_path / f"f{number}") == weights(whole)
        transcoder.mcore2hf(two, tmp_path / f"p{number}", expert_layout="per-expert", sync=False)
        assert weights(tmp_path / f"p{number}") == weights(split)
        transcoder.mcore2hf(two, tmp_path / f"l{number}", sync=False)
        assert (tmp_path / f"l{number}" / "model.safetensors").read_bytes() == (
            whole / "model.safetensors"
        ).read_bytes()


def weights(directory: Path) -> dict[str, tuple[tuple[int, ...], bytes]]:
    """Every tensor of a directory."""
    return {e.name: (e.shape, e.data) for part in read_files(directory).values() for e in part}


def test_files_with_both_spellings_are_refused_with_the_evidence(tmp_path: Path) -> None:
    source = make_model("qwen3-moe", tmp_path / "hf", shards=1)
    (entries,) = read_files(source).values()
    both = [*entries, *(entry for entry in fused(entries) if entry.name.endswith("experts.down_proj"))]
    write_files(source, {"model.safetensors": both})
    with pytest.raises(InputError, match="per-expert") as caught:
        transcoder.hf2mcore(source, tmp_path / "m")
    assert "model.layers.0.mlp.experts.down_proj" in str(caught.value)


def test_layers_that_are_not_alike_have_no_stacked_keys(tmp_path: Path) -> None:
    source = make_model("qwen3-moe-mixed", tmp_path / "hf")
    with pytest.raises(UsageError, match="per-layer"):
        transcoder.hf2mcore(source, tmp_path / "m", layout="stacked")
    transcoder.hf2mcore(source, tmp_path / "m")
    keys = [row["key"] for row in transcoder.inspect(tmp_path / "m")["keys"]]
    assert "decoder.layers.1.mlp.linear_fc1.weight" in keys
    assert "decoder.layers.0.mlp.experts.experts.linear_fc1.weight" in keys


@pytest.mark.parametrize(
    ("grid", "fits"), [({"ep": 3}, "1, 2, 4"), ({"etp": 4}, "1, 2, 5, 10"), ({"ep": 8}, "1, 2, 4")]
)
def test_grids_that_do_not_fit_are_refused_with_those_that_do(grid: dict[str, int], fits: str, tmp_path: Path) -> None:
    source = make_model("qwen3-moe", tmp_path / "hf")
    with pytest.raises(UsageError, match=fits):
        transcoder.hf2mcore(source, tmp_path / "m", **grid)
    assert not (tmp_path / "m").exists()


def test_every_expert_rank_has_its_own_file(tmp_path: Path) -> None:
    source = make_model("qwen3-moe", tmp_path / "hf")
    transcoder.hf2mcore(source, tmp_path / "m", tp=2, ep=2, etp=1)
    rows = {row["key"]: row for row in transcoder.inspect(tmp_path / "m")["keys"]}
    experts = rows["decoder.layers.mlp.experts.experts.linear_fc1.weight"]
    assert (experts["shape"], experts["grid"]) == ([3, 4, 20, 18], [3, 4, 2, 1])
    assert {name.split("_")[2] for name in experts["files"]} == {"0", "1"}
