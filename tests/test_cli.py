"""Options and their effects: spellings, aliases, sizes, what an import writes, what overwriting replaces."""

from __future__ import annotations

import json
import shutil
import socket
from pathlib import Path

import click
import pytest
from command_line import EXAMPLE, Tree, flip, names, succeed, transcode, tree

import transcoder
from transcoder.cli import cli
from transcoder.formats.trainstate import step_of
from transcoder.iterations import STATE_TRACKER, TEXT_TRACKER

MANIFEST = "transcode-manifest.json"
SIDE = ["LICENSE", "README.md", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"]
TOKENIZER = ["tokenizer.json", "tokenizer_config.json"]
ITERATION = [".metadata", "__0_0.distcp", "__0_1.distcp", "common.pt", "hf", "metadata.json", "run_config.yaml"]
ITERATION += ["tokenizer", "train_state.pt", MANIFEST]
COMMANDS = sorted(cli.commands)
COMMON = ["--json", "--no-progress", "--quiet", "--log-level"]


def _below(files: Tree, folder: str) -> Tree:
    return {name: data for name, data in files.items() if name.startswith(f"{folder}/")}


# --- spellings ---


def test_the_program_lists_its_commands() -> None:
    listed = succeed("--help").out
    assert [name for name in COMMANDS if f"  {name} " not in listed] == []
    assert transcode("plan", "--no_such_option", "--help").code == 2


def test_the_version_is_told() -> None:
    assert succeed("--version").out.split()[-1][0].isdigit()


def _words(option: click.Option, name: str) -> list[str]:
    if option.is_flag:
        return [name]
    return [name, option.type.choices[0] if isinstance(option.type, click.Choice) else "1"]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_and_underscores_do_for_dashes_in_its_options(command: str) -> None:
    found = [option for option in cli.commands[command].params if isinstance(option, click.Option)]
    dashed = [(option, name) for option in found for name in option.opts if "-" in name[2:]]
    assert len(dashed) >= 2
    line = [word for option, name in dashed for word in _words(option, f"--{name[2:].replace('-', '_')}")]
    told = succeed(command, *line, "--help")  # options are parsed before the help is shown
    assert [option for option in [*COMMON, *(name for _, name in dashed)] if option not in told.out] == []


def test_underscores_do_for_dashes_in_values_and_have_the_same_effect(tmp_path: Path) -> None:
    line = ["hf2mcore", EXAMPLE, tmp_path / "new", "--json"]
    one = succeed(*line, "--dry-run", "--layout", "per-layer", "--make-vocab-size-divisible-by", 384)
    two = succeed(*line, "--dry_run", "--layout", "per_layer", "--make_vocab_size_divisible_by", 384)
    assert one.out == two.out
    assert "[1152, 128]" in one.out
    assert succeed(*line, "--dry-run", "--format", "torch_dist").out == succeed(*line, "--dry-run").out


@pytest.mark.parametrize(("form", "words"), [("zarr", "0.15 and older"), ("zarr3", "tensorstore")])
def test_another_format_is_planned_written_and_named(tmp_path: Path, form: str, words: str) -> None:
    line = ["hf2mcore", EXAMPLE, tmp_path / "new", "--tp", 2, "--format", form]
    planned = succeed(*line, "--dry-run").out
    assert f"embedding.word_embeddings.weight/{'1.0' if form == 'zarr' else 'c/1/0'}" in planned
    done = succeed(*line)
    assert words in done.err and done.err.startswith("warning: ")
    assert "Megatron Bridge  checkpoint" not in done.out and ("Megatron-LM" in done.out) == (form == "zarr")
    assert json.loads(succeed("inspect", tmp_path / "new", "--json").out)["format"] == form
    assert succeed("hf2mcore", "--help").out.count("torch_dist|zarr|zarr3") == 1


def test_device_map_is_accepted_and_said_to_be_unnecessary(tmp_path: Path) -> None:
    line = ["import", "--hf-model", EXAMPLE, "--megatron-path", tmp_path / "mcore", "--device-map", "auto"]
    done = succeed(*line)
    assert [text for text in done.err.splitlines() if "--device-map" in text and "not needed" in text] != []
    assert done.err.startswith("warning: ")


def test_import_takes_the_options_of_hf2mcore(tmp_path: Path) -> None:
    options = ["--tp", 2, "--pp", 2, "--iteration", 3, "--layout", "per-layer"]
    succeed("hf2mcore", EXAMPLE, tmp_path / "one", "--dtype", "float32", *options)
    alias = ["import", "--hf-model", EXAMPLE, "--megatron-path", tmp_path / "two", "--torch-dtype", "float32"]
    succeed(*alias, *options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert succeed("inspect", tmp_path / "two", "--json").report["keys"][0]["dtype"] == "float32"


def test_export_takes_the_options_of_mcore2hf(tmp_path: Path, mcore: Path) -> None:
    options = ["--hf-model", EXAMPLE, "--dtype", "float16", "--max-shard-size", "600KB"]
    succeed("mcore2hf", mcore, tmp_path / "one", *options)
    succeed("export", "--megatron-path", mcore, "--hf-path", tmp_path / "two", *options)
    assert tree(tmp_path / "one") == tree(tmp_path / "two")
    assert succeed("inspect", tmp_path / "two", "--json").report["keys"][0]["dtype"] == "float16"


def test_shards_are_at_most_as_large_as_wanted(tmp_path: Path, mcore: Path) -> None:
    succeed("mcore2hf", mcore, tmp_path / "hf", "--dtype", "float32", "--max-shard-size", "0.8MB")
    catalog = transcoder.open_checkpoint(tmp_path / "hf")
    shards: dict[str, int] = {}
    for spec in catalog.values():
        shards[spec.chunks[0].file] = shards.get(spec.chunks[0].file, 0) + spec.nbytes
    assert max(shards.values()) <= 800_000
    assert sorted(shards) == [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    assert sum(shards.values()) == 4 * 1_000_576


@pytest.mark.parametrize("size", ["16MiB", "16777216", "0.5GiB", "17 mb"])
def test_sizes_are_read_as_people_write_them(tmp_path: Path, size: str) -> None:
    assert succeed("roundtrip", EXAMPLE, "--memory", size, "--json").report["status"] == "ok"


def test_the_plan_says_the_memory_that_was_given() -> None:
    found = [succeed("plan", EXAMPLE, "--memory", size, "--json").report["plan"]["memory"] for size in ("64MiB", "1GB")]
    assert found[1] - found[0] == 10**9 - (64 << 20)


def test_the_architecture_can_be_named_when_the_config_does_not(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"architectures": None}))
    refused = transcode("hf2mcore", source, tmp_path / "mcore")
    assert refused.code == 3
    assert "LlamaForCausalLM" in refused.err
    succeed("hf2mcore", source, tmp_path / "mcore", "--arch", "LlamaForCausalLM")
    succeed("mcore2hf", tmp_path / "mcore", tmp_path / "hf", "--arch", "LlamaForCausalLM")
    assert tree(tmp_path / "hf") == tree(source)


# --- what is written ---


def test_the_default_tree_serves_every_reader(mcore: Path) -> None:
    assert names(mcore) == ["iter_0000000", TEXT_TRACKER, STATE_TRACKER, "release"]
    assert (mcore / TEXT_TRACKER).read_bytes() == b"release"
    assert step_of(memoryview((mcore / STATE_TRACKER).read_bytes())) == 0
    assert (mcore / "release").readlink() == Path("iter_0000000")
    iteration = mcore / "iter_0000000"
    assert names(iteration) == sorted(ITERATION)
    assert tree(iteration / "hf") == {name: (EXAMPLE / name).read_bytes() for name in SIDE}
    assert tree(iteration / "tokenizer") == {name: (EXAMPLE / name).read_bytes() for name in TOKENIZER}


def test_a_number_is_written_as_the_iteration(tmp_path: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "mcore", "--iteration", "0042")
    assert names(tmp_path / "mcore") == ["iter_0000042", TEXT_TRACKER, STATE_TRACKER]
    assert (tmp_path / "mcore" / TEXT_TRACKER).read_bytes() == b"42"
    for path in (tmp_path / "mcore" / STATE_TRACKER, tmp_path / "mcore" / "iter_0000042" / "train_state.pt"):
        assert step_of(memoryview(path.read_bytes())) == 42
    assert names(tmp_path / "mcore" / "iter_0000042") == sorted(ITERATION)
    succeed("mcore2hf", tmp_path / "mcore", tmp_path / "hf")
    assert tree(tmp_path / "hf") == tree(EXAMPLE)


def test_a_release_is_written_as_a_real_directory_without_state_tracker(tmp_path: Path, mcore: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "mcore", "--iteration", "release")
    assert names(tmp_path / "mcore") == [TEXT_TRACKER, "release"]
    assert not (tmp_path / "mcore" / "release").is_symlink()
    assert (tmp_path / "mcore" / TEXT_TRACKER).read_bytes() == b"release"
    one, two = tree(tmp_path / "mcore" / "release"), tree(mcore / "iter_0000000")
    assert {name for name in two if one.get(name) != two[name]} <= {MANIFEST}
    succeed("mcore2hf", tmp_path / "mcore", tmp_path / "hf")
    assert tree(tmp_path / "hf") == tree(EXAMPLE)


def test_every_rank_writes_two_files_whatever_the_workers(tmp_path: Path) -> None:
    for workers in (1, 3):
        line = ["--tp", 2, "--pp", 2, "--workers", workers, "--memory", "64MiB"]
        succeed("hf2mcore", EXAMPLE, tmp_path / str(workers), *line)
    payloads = [name for name in names(tmp_path / "1" / "iter_0000000") if name.endswith(".distcp")]
    assert payloads == [f"__{rank}_{part}.distcp" for rank in range(4) for part in range(2)]
    assert tree(tmp_path / "1") == tree(tmp_path / "3")


def test_no_output_byte_tells_the_place_the_host_or_the_time(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "a-source-of-its-own")
    found = []
    for folder, zone in (("first-place", "UTC"), ("second-place", "Asia/Tokyo")):
        done = transcode("hf2mcore", source, folder, cwd=tmp_path, TZ=zone, PYTHONHASHSEED=str(len(zone)))
        assert done.code == 0, done.err
        found.append(tree(tmp_path / folder))
    assert found[0] == found[1]
    host = socket.gethostname()
    told = [str(tmp_path), source.name, "first-place", *([host] if len(host) > 5 else [])]
    assert [(name, word) for name, data in found[0].items() for word in told if word in _text(data)] == []


def _text(data: bytes | str) -> str:
    return data if isinstance(data, str) else data.decode("latin-1")


def test_side_files_at_any_depth_come_back_and_rubbish_does_not(tmp_path: Path) -> None:
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    for name in ("extra/deep/notes.txt", "modeling_own.py", ".git/config", ".cache/x.json", "original/params.json"):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text("raise SystemExit('executed')")
    succeed("hf2mcore", source, tmp_path / "mcore")
    carried = tree(tmp_path / "mcore" / "iter_0000000" / "hf")
    assert sorted(set(carried) - set(SIDE)) == ["extra/deep/notes.txt", "modeling_own.py"]
    succeed("mcore2hf", tmp_path / "mcore", tmp_path / "hf")
    left = {name for name in tree(source) if name.startswith((".git/", ".cache/", "original/"))}
    assert tree(tmp_path / "hf") == {name: data for name, data in tree(source).items() if name not in left}


def test_an_older_dtype_is_kept_unless_another_is_wanted(tmp_path: Path, mcore: Path) -> None:
    for dtype in ("float32", "float16"):
        succeed("hf2mcore", EXAMPLE, tmp_path / dtype, "--dtype", dtype)
        rows = succeed("inspect", tmp_path / dtype, "--json").report["keys"]
        assert {row["dtype"] for row in rows} == {dtype}
    assert {row["dtype"] for row in succeed("inspect", mcore, "--json").report["keys"]} == {"bfloat16"}


# --- overwriting ---


@pytest.fixture
def changed(tmp_path: Path) -> Path:
    """The example with one other weight and one other side file."""
    source = shutil.copytree(EXAMPLE, tmp_path / "changed")
    flip(source / "model-00003-of-00003.safetensors", -1)
    (source / "README.md").write_text("changed")
    return source


def test_overwriting_an_iteration_replaces_it_whole(tmp_path: Path, own: Path, changed: Path) -> None:
    (own / "iter_0000000" / "hf" / "old.txt").write_text("of the old iteration")
    succeed("hf2mcore", changed, own, "--overwrite")
    succeed("hf2mcore", changed, tmp_path / "fresh")
    assert tree(own) == tree(tmp_path / "fresh")
    assert names(tmp_path) == ["changed", "fresh", "own"]


def test_overwriting_never_touches_foreign_files_or_other_iterations(own: Path, changed: Path) -> None:
    foreign = {"notes.txt": b"mine", "iter_0000003/.metadata": b"a training run's", "logs/a.log": b"mine, too"}
    for name, data in foreign.items():
        (own / name).parent.mkdir(exist_ok=True)
        (own / name).write_bytes(data)
    before = tree(own)
    succeed("hf2mcore", changed, own, "--overwrite", "--iteration", 7)
    after = tree(own)
    assert {name: after[name] for name in foreign} == foreign
    assert _below(after, "iter_0000000") == _below(before, "iter_0000000")
    assert after["release"] == before["release"]
    assert after[TEXT_TRACKER] == b"7"
    assert set(after) - set(before) == set(_below(after, "iter_0000007"))
    succeed("verify", own, changed)
    succeed("verify", own / "iter_0000000", EXAMPLE)


def test_overwriting_a_release_directory_by_the_default_tree(tmp_path: Path, mcore: Path) -> None:
    succeed("hf2mcore", EXAMPLE, tmp_path / "own", "--iteration", "release")
    succeed("hf2mcore", EXAMPLE, tmp_path / "own", "--overwrite")
    assert tree(tmp_path / "own") == tree(mcore)


def test_overwriting_an_export_replaces_what_it_writes_and_old_shards(tmp_path: Path, mcore: Path) -> None:
    target = shutil.copytree(EXAMPLE, tmp_path / "hf")
    (target / "notes.txt").write_text("mine")
    (target / "adapter").mkdir()
    (target / "adapter" / "adapter.safetensors").write_bytes(b"mine, too")
    (target / "config.json").write_text("{}")
    succeed("mcore2hf", mcore, target, "--overwrite", "--dtype", "float32")
    kept = {"notes.txt": b"mine", "adapter/adapter.safetensors": b"mine, too"}
    assert {name: tree(target)[name] for name in kept} == kept
    assert names(target) == sorted([*SIDE, "adapter", "notes.txt", "model.safetensors"])
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (EXAMPLE, target))
    assert before["dtype"] == "bfloat16" and after == before | {"dtype": "float32"}
    assert succeed("check", target, "--json").report["tensors"] == 39
