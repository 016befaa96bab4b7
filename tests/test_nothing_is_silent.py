"""Whatever is done to one tensor or one size of a Hugging Face directory, the import refuses it by name."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hf_models import (
    EXPERT_KINDS,
    KINDS,
    Entry,
    Files,
    config_of,
    emit,
    make_model,
    put,
    read_files,
    shapes_of,
    write_config,
    write_files,
)
from safetensors import deserialize

import transcoder
from transcoder import InputError

Case = tuple[str, tuple[str, ...], Callable[[Path], None]]  # what is done, the names that the refusal must have, how
SIZE_FIELDS = (
    "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "intermediate_size", "vocab_size",
    "head_dim", "num_experts", "num_local_experts", "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
UNUSED = {"qwen3-moe": {"intermediate_size"}}  # all its layers have experts
# Qwen2-MoE has dense layers, sparse ones and a shared expert; the other mixtures take minutes.
ALL_KINDS = (
    *KINDS,
    "qwen2-moe",
    *(pytest.param(kind, marks=pytest.mark.slow) for kind in EXPERT_KINDS if kind != "qwen2-moe"),
)
STRANGE_SIZES = (0, -1, 1.5, "6", None, [], {}, True, 10**9, 10**30)


def named(error: InputError, name: str) -> bool:
    """Whether a problem is about the tensor, or a message quotes its name."""
    return any(problem.tensor == name for problem in error.problems) or repr(name) in str(error)


def outcome(source: Path, destination: Path) -> InputError | None:
    """The refusal of an import, after which nothing may be visible where the destination would be."""
    try:
        transcoder.hf2mcore(source, destination, workers=1, sync=False)
    except InputError as error:
        assert error.exit_code == 3
        assert not list(destination.parent.iterdir()), "a refused import left something behind"
        return error
    return None


def failures(kind: str, tmp_path: Path, cases: Callable[[Files], Iterator[Case]]) -> tuple[int, list[str]]:
    """How many cases ran, and those of them that were not refused by name."""
    source, place = make_model(kind, tmp_path / "hf"), tmp_path / "place"
    place.mkdir()
    files, wrong, count = read_files(source), [], 0
    for what, names, change in cases(files):
        change(source)
        error = outcome(source, place / "mcore")
        assert error is not None, f"{kind}: {what} of {names[0]} was accepted"
        if not all(named(error, name) for name in names):
            wrong.append(f"{kind}: {what} of {names[0]}: {error}")
        write_files(source, files)
        count += 1
    assert outcome(source, place / "mcore") is None, f"{kind}: the undamaged files were refused"
    return count, wrong


def with_entry(files: Files, file: str, at: int, *new: Entry) -> Callable[[Path], None]:
    """Write the files with `new` in place of one tensor; the index fits them."""
    changed = {**files, file: [*files[file][:at], *new, *files[file][at + 1 :]]}
    return lambda source: write_files(source, changed)


def with_shard(files: Files, file: str, entries: list[Entry]) -> Callable[[Path], None]:
    """Write one shard only; the index stays what it was."""
    return lambda source: put(source / file, emit(entries))


def every_tensor(files: Files) -> Iterator[tuple[str, int, Entry]]:
    """Every tensor with its file and its place in it."""
    for file, entries in files.items():
        for at, entry in enumerate(entries):
            yield file, at, entry


def renamings(name: str) -> Iterator[str]:
    """Names that a slip of a script would give."""
    yield from (f"{name}x", f"base.{name}")
    if found := re.search(r"layers\.(\d+)\.", name):
        yield name.replace(found[0], "layers.3.")
        yield name.replace(found[0], f"layers.0{found[1]}.")


def missing_and_renamed(files: Files) -> Iterator[Case]:
    """A tensor is gone, or has another name: in index and shard, or in the shard alone."""
    for file, at, entry in every_tensor(files):
        rest = [other for other in files[file] if other is not entry]
        yield "removal", (entry.name,), with_entry(files, file, at)
        yield "removal from the shard alone", (entry.name,), with_shard(files, file, rest)
        for new in renamings(entry.name):
            names, renamed = (entry.name, new), replace(entry, name=new)
            yield f"renaming to {new}", names, with_entry(files, file, at, renamed)
            yield f"renaming in the shard alone to {new}", names, with_shard(files, file, [*rest, renamed])


def repeated_and_added(files: Files) -> Iterator[Case]:
    """A tensor is there twice, in two shards, or an unknown one stands beside it."""
    for file, at, entry in every_tensor(files):
        other = next(name for name in files if name != file)
        yield "repetition in another shard", (entry.name,), with_shard(files, other, [*files[other], entry])
        both = {**files, other: [*files[other], entry]}
        yield "repetition under a new index", (entry.name,), lambda source, both=both: write_files(source, both)
        for new in (f"{entry.name}_scale", entry.name.replace("weight", "bias2")):
            extra = replace(entry, name=new if new != entry.name else f"{new}.x")
            yield "addition", (extra.name,), with_entry(files, file, at, entry, extra)
            yield "addition that the index lacks", (extra.name,), with_shard(files, file, [*files[file], extra])


def wrong_types_and_shapes(files: Files) -> Iterator[Case]:
    """Another dtype, a dimension that is one off, another rank, fewer bytes; the file is consistent or is not."""
    for file, at, entry in every_tensor(files):
        for what, new in variants(entry):
            yield what, (entry.name,), with_entry(files, file, at, new)


def variants(entry: Entry) -> Iterator[tuple[str, Entry]]:
    """One tensor changed in every way that a header can say."""
    for dtype in ("F16", "F32", "I16", "BF17"):
        yield f"dtype {dtype!r} with the same bytes", replace(entry, dtype=dtype)
    yield "dtype F32 with its bytes", entry.retyped("F32")
    for dim, size in enumerate(entry.shape):
        shapes = {new: (*entry.shape[:dim], new, *entry.shape[dim + 1 :]) for new in (0, size - 1, size + 1)}
        for new, shape in shapes.items():
            yield f"dimension {dim} = {new}", entry.reshaped(shape)
        yield f"dimension {dim} + 1 with the same bytes", replace(entry, shape=shapes[size + 1])
    yield "one axis more", entry.reshaped((1, *entry.shape))
    yield "a trailing axis more", entry.reshaped((*entry.shape, 1))
    if len(set(entry.shape)) > 1:
        yield "transposition", entry.reshaped(entry.shape[::-1])
    if len(entry.shape) > 1:
        yield "flattening", replace(entry, shape=(entry.shape[0] * entry.shape[1],))
    for size in (0, len(entry.data) // 2, len(entry.data) - 1):
        yield f"a range of {size} bytes", replace(entry, data=entry.data[:size])


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("cases", [missing_and_renamed, repeated_and_added, wrong_types_and_shapes])
def test_one_changed_tensor_is_refused_by_name(
    kind: str, cases: Callable[[Files], Iterator[Case]], tmp_path: Path
) -> None:
    count, wrong = failures(kind, tmp_path, cases)
    assert count >= 4 * len(shapes_of(config_of(kind)))
    assert not wrong, f"{len(wrong)} of {count} refusals do not name the tensor, first:\n" + "\n".join(wrong[:3])


def shifted(data: bytes, name: str, first: int, last: int) -> bytes:
    """A file whose header gives one tensor another range."""
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    begin, end = table[name]["data_offsets"]
    table[name]["data_offsets"] = [begin + first, end + last]
    header = json.dumps(table).encode()
    return len(header).to_bytes(8, "little") + header + data[start:]


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_file_whose_ranges_do_not_fill_it_is_refused_by_file(kind: str, tmp_path: Path) -> None:
    source, place = make_model(kind, tmp_path / "hf"), tmp_path / "place"
    place.mkdir()
    for file, _, entry in every_tensor(read_files(source)):
        data = (source / file).read_bytes()
        ranges = [(2, 2), (-2, -2), (0, 2), (0, -2), (1 << 40, 1 << 40)]
        damaged = [shifted(data, entry.name, *both) for both in ranges]
        for wrong in (*damaged, data[:-1], data[: -len(entry.data)], data + entry.data, data[:7], b""):
            put(source / file, wrong)
            error = outcome(source, place / "mcore")
            assert error is not None, f"{kind}: {entry.name} in {len(wrong)} bytes was accepted"
            assert file in {problem.file for problem in error.problems}, f"{kind}: {entry.name}: {error}"
        put(source / file, data)
    assert outcome(source, place / "mcore") is None


def payloads(checkpoint: Path) -> dict[str, bytes]:
    """The weight files of a Megatron checkpoint."""
    return {path.name: path.read_bytes() for path in (checkpoint / "iter_0000000").glob("*.distcp")}


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_strange_or_missing_size_never_gives_other_weights(kind: str, tmp_path: Path) -> None:
    source, config = make_model(kind, tmp_path / "hf"), config_of(kind)
    transcoder.hf2mcore(source, tmp_path / "good", sync=False)
    right, place = payloads(tmp_path / "good"), tmp_path / "place"
    place.mkdir()
    for field in SIZE_FIELDS:
        changed = [{**config, field: value} for value in STRANGE_SIZES]
        for number, wrong in enumerate([*changed, {k: v for k, v in config.items() if k != field}]):
            write_config(source, wrong)
            if outcome(source, place / "mcore") is None:
                assert payloads(place / "mcore") == right, f"{kind}: {field} = {wrong.get(field)!r} gave other weights"
                place = tmp_path / f"place-{field}-{number}"
                place.mkdir()


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("field", ["tie_word_embeddings", "attention_bias", "mlp_bias"])
def test_a_flipped_switch_is_refused(kind: str, field: str, tmp_path: Path) -> None:
    config, source = config_of(kind), make_model(kind, tmp_path / "hf")
    place = tmp_path / "place"
    place.mkdir()
    used = field == "tie_word_embeddings" or config["model_type"] in ("llama", "mistral")
    used |= field == "attention_bias" and not any(name.endswith(".bias") for name in shapes_of(config))
    write_config(source, {**config, field: not config.get(field, False)})
    error = outcome(source, place / "mcore")
    assert (error is not None) == used, f"{kind}: {field} flipped"
    if error is not None:
        assert any(problem.tensor or problem.file for problem in error.problems), f"{kind}: {field}: {error}"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_the_fixtures_are_whole_and_come_back(kind: str, tmp_path: Path) -> None:
    source = make_model(kind, tmp_path / "hf")
    official = [row for path in sorted(source.glob("*.safetensors")) for row in deserialize(path.read_bytes())]
    shapes = shapes_of(json.loads((source / "config.json").read_text()))
    assert {name: tuple(row["shape"]) for name, row in official} == shapes
    transcoder.hf2mcore(source, tmp_path / "mcore", sync=False)
    transcoder.mcore2hf(tmp_path / "mcore", tmp_path / "back", sync=False)
    for path in source.iterdir():
        assert (tmp_path / "back" / path.name).read_bytes() == path.read_bytes(), path.name


def cut_files(files: Files) -> Iterator[Case]:
    """The file ends inside a tensor."""
    for file, at, entry in every_tensor(files):
        behind = sum(len(other.data) for other in files[file][at + 1 :])
        data = emit(files[file])
        for missing in (1, len(entry.data) // 2, len(entry.data)):
            kept = data[: len(data) - behind - missing]
            yield (
                f"the last {missing} bytes cut off",
                (entry.name,),
                lambda source, file=file, kept=kept: (source / file).write_bytes(kept) and None,
            )


def repeated_keys(files: Files) -> Iterator[Case]:
    """One header names a tensor twice, with the same range's length or another."""
    for file, at, entry in every_tensor(files):
        yield "repetition in one header", (entry.name,), with_entry(files, file, at, entry, entry)
        yield (
            "repetition in one header",
            (entry.name,),
            with_shard(files, file, [*files[file], replace(entry, shape=())]),
        )


@pytest.mark.parametrize("kind", ALL_KINDS)
@pytest.mark.parametrize("cases", [cut_files, repeated_keys])
def test_a_cut_file_or_a_repeated_key_is_refused_by_name(
    kind: str, cases: Callable[[Files], Iterator[Case]], tmp_path: Path
) -> None:
    count, wrong = failures(kind, tmp_path, cases)
    assert count >= 2 * len(shapes_of(config_of(kind)))
    assert not wrong, f"{len(wrong)} of {count} refusals do not name the tensor, first:\n" + "\n".join(wrong[:3])


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_a_size_that_is_off_by_one_is_refused(kind: str, tmp_path: Path) -> None:
    source, place, config = make_model(kind, tmp_path / "hf"), tmp_path / "place", config_of(kind)
    place.mkdir()
    fields = [field for field in SIZE_FIELDS if field in config and field not in UNUSED.get(kind, ())]
    for field in fields:
        for size in (config[field] - 1, config[field] + 1, 2 * config[field]):
            write_config(source, {**config, field: size})
            assert outcome(source, place / "mcore") is not None, f"{kind}: {field} = {size} was accepted"
    assert len(fields) >= 6
