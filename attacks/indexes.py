"""`model.safetensors.index.json`: paths for names, files that disagree with it, bombs."""

from __future__ import annotations

import json
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import model, read_file, table, write_file
from attacks.safetensors_files import NORM, QUERY

INDEX = "model.safetensors.index.json"
HF = "hf2mcore check"


def edit(bench: Bench, **places: Any) -> None:
    """Change entries of the weight map; a key is a tensor's name."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    rows["weight_map"] |= places
    path.write_text(json.dumps(rows))


def move(bench: Bench, name: Any) -> None:
    """Say that every tensor of the second shard lies in `name`."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    for tensor, place in rows["weight_map"].items():
        if place == bench.second.name:
            rows["weight_map"][tensor] = name
    path.write_text(json.dumps(rows))


def reject(needle: str = "index") -> Any:
    """An index that must be refused."""
    return attack("reject", "hf", HF, needle)


@reject()
def path_to_the_parent(bench: Bench) -> None:
    """A value that leaves the folder, to a good shard that lies there."""
    assert bench.stranger.is_dir()
    move(bench, f"../outside/model/{bench.second.name}")


@reject()
def absolute_path(bench: Bench) -> None:
    """A value that is absolute."""
    move(bench, str(bench.stranger / bench.second.name))


@reject()
def path_into_a_folder(bench: Bench) -> None:
    """A value below a folder of the model."""
    (bench.source / "more").mkdir()
    bench.second.rename(bench.source / "more" / bench.second.name)
    move(bench, f"more/{bench.second.name}")


@reject()
def path_of_another_system(bench: Bench) -> None:
    """A separator of Windows."""
    bench.second.rename(bench.source / "more\\second.safetensors")
    move(bench, "more\\second.safetensors")


@reject()
def drive_of_another_system(bench: Bench) -> None:
    """A drive letter."""
    move(bench, "C:second.safetensors")


@reject()
def dot(bench: Bench) -> None:
    """The folder itself."""
    move(bench, ".")


@reject()
def dot_dot(bench: Bench) -> None:
    """The folder above."""
    move(bench, "..")


@reject()
def dot_slash(bench: Bench) -> None:
    """A path that is right, but a path."""
    move(bench, f"./{bench.second.name}")


@reject()
def empty(bench: Bench) -> None:
    """No name."""
    move(bench, "")


@reject()
def nul_in_a_name(bench: Bench) -> None:
    """A name that the system cuts short."""
    move(bench, f"{bench.second.name}\0.txt")


@reject()
def name_of_ten_thousand_letters(bench: Bench) -> None:
    """A name longer than a file's can be."""
    move(bench, "x" * 10_000 + ".safetensors")


@reject()
def name_is_a_number(bench: Bench) -> None:
    """A value that the system would take for an open file."""
    move(bench, 0)


@reject()
def name_is_a_list(bench: Bench) -> None:
    """A value that cannot be a key."""
    move(bench, [bench.second.name])


@reject()
def name_is_null(bench: Bench) -> None:
    """A value that is null."""
    move(bench, None)


@reject("missing|no such|absent|not found|not there")
def missing_shard(bench: Bench) -> None:
    """A file that the index names is not there."""
    bench.second.unlink()


@reject(QUERY)
def tensor_in_two_shards(bench: Bench) -> None:
    """The other shard holds a second copy, with other values."""
    header, data = read_file(bench.second)
    header[QUERY] = {"dtype": "BF16", "shape": [16, 16], "data_offsets": [len(data), len(data) + 512]}
    write_file(bench.second, header, data + bytes(512))


@reject(QUERY)
def tensor_of_another_shard(bench: Bench) -> None:
    """The index sends a reader to the wrong file."""
    edit(bench, **{QUERY: bench.second.name})


@reject("ghost")
def tensor_of_no_shard(bench: Bench) -> None:
    """The index names a tensor that no file holds."""
    edit(bench, **{"model.layers.0.ghost.weight": bench.first.name})


@reject(QUERY)
def tensor_not_in_the_index(bench: Bench) -> None:
    """A shard holds a tensor that the index does not name."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    del rows["weight_map"][QUERY]
    path.write_text(json.dumps(rows))


@reject()
def duplicate_key(bench: Bench) -> None:
    """One tensor, two files: readers differ in which they believe."""
    path = bench.source / INDEX
    text = path.read_text()
    path.write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{bench.second.name}", ', 1))


@reject()
def duplicate_weight_map(bench: Bench) -> None:
    """Two maps."""
    path = bench.source / INDEX
    path.write_text('{"weight_map": {"a": "b"}, ' + path.read_text()[1:])


@reject()
def no_weight_map(bench: Bench) -> None:
    """An index without a map."""
    (bench.source / INDEX).write_text('{"metadata": {"total_size": 1}}')


@reject()
def weight_map_is_a_list(bench: Bench) -> None:
    """A map that is an array."""
    (bench.source / INDEX).write_text('{"weight_map": ["a"]}')


@reject()
def empty_weight_map(bench: Bench) -> None:
    """A map of nothing."""
    (bench.source / INDEX).write_text('{"weight_map": {}}')


@reject()
def not_json(bench: Bench) -> None:
    """An index cut short."""
    path = bench.source / INDEX
    path.write_text(path.read_text()[:-20])


@reject()
def depth(bench: Bench) -> None:
    """Brackets that overflow a recursive parser."""
    (bench.source / INDEX).write_text('{"weight_map": {}, "metadata": ' + "[" * 100_000 + "]" * 100_000 + "}")


@reject()
def depth_in_text_is_no_escape(bench: Bench) -> None:
    """A quote in a string must not hide the brackets from a scan."""
    (bench.source / INDEX).write_text('{"a": "\\\\", "b": ' + "[" * 100_000 + '"' + "]" * 100_000 + "}")


@reject()
def above_the_limit(bench: Bench) -> None:
    """A sparse index of 300 MB."""
    with (bench.source / INDEX).open("r+b") as file:
        file.truncate(300_000_000)


@reject()
def not_utf8(bench: Bench) -> None:
    """An index with a byte that is not UTF-8."""
    path = bench.source / INDEX
    path.write_bytes(path.read_bytes().replace(b"total_size", b"total\xff", 1))


@reject("several|index")
def two_indexes_in_one(bench: Bench) -> None:
    """The index is a folder."""
    (bench.source / INDEX).unlink()
    (bench.source / INDEX).mkdir()


@attack("warn", "hf", "hf2mcore plan inspect", "index")
def no_index_for_two_shards(bench: Bench) -> None:
    """Two shards and nothing that says which tensors there should be."""
    (bench.source / INDEX).unlink()


@attack("reject", "hf", "hf2mcore plan", "lm_head|index|missing")
def no_index_and_a_shard_lost(bench: Bench) -> None:
    """Without an index the lost shard shows by the names of the files, or by the weights."""
    (bench.source / INDEX).unlink()
    bench.second.unlink()


@attack("warn", "hf", "check", "total_size|index")
def total_size_of_another_model(bench: Bench) -> None:
    """The index says another number of bytes."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    rows["metadata"]["total_size"] = 10**18
    path.write_text(json.dumps(rows))


@attack("ok", "hf", HF)
def more_metadata(bench: Bench) -> None:
    """Other fields beside `total_size` are legal."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    rows["metadata"]["total_parameters"] = 5
    rows["note"] = "\u001b[2J"
    path.write_text(json.dumps(rows))


@attack("ok", "hf", HF)
def no_total_size(bench: Bench) -> None:
    """`metadata` may be absent."""
    path = bench.source / INDEX
    rows = json.loads(path.read_text())
    del rows["metadata"]
    path.write_text(json.dumps(rows))


@attack("ok", "hf", HF)
def one_shard_with_index(bench: Bench) -> None:
    """An index of one file is legal, whatever the file is called."""
    for path in (bench.first, bench.second):
        path.unlink()
    write_file(bench.source / "weights of Zoë.safetensors", *table(model()))
    places = dict.fromkeys(model(), "weights of Zoë.safetensors")
    (bench.source / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))


@attack("warn", "hf", "hf2mcore plan", "model.safetensors|weight files|left out")
def both_layouts(bench: Bench) -> None:
    """`model.safetensors` beside an index of other files: another reader takes the former."""
    write_file(bench.source / "model.safetensors", *table(model()))
