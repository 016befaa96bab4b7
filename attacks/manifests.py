"""`transcode-manifest.json` that lies, in a checkpoint that the tool made."""

# ruff: noqa: E501 (a case is one line)

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from typing import Any

from attacks.bench import Bench
from attacks.case import attack

MANIFEST = "transcode-manifest.json"
WORDS = "mcore2hf check"
Rows = dict[str, Any]


def load(bench: Bench) -> Rows:
    """The good manifest."""
    found: Rows = json.loads((bench.folder / MANIFEST).read_text())
    return found


def sealed(rows: Rows) -> str:
    """The manifest with a digest of itself that is right: xxh3-128 of the text with that field empty."""
    import xxhash

    text = written(rows | {"self": ""})
    return written(rows | {"self": f"xxh3-128:{xxhash.xxh3_128_hexdigest(text.encode())}"})


def written(rows: Rows) -> str:
    """Sorted keys, one entry of a list a line, as the tool writes it."""
    fields = []
    for key in sorted(rows):
        value = rows[key]
        if key in ("files", "tensors") and isinstance(value, list):
            lines = ",\n".join("  " + json.dumps(row, sort_keys=True, ensure_ascii=False) for row in value)
            fields.append(f"{json.dumps(key)}: [\n{lines}\n]")
        else:
            fields.append(f"{json.dumps(key)}: {json.dumps(value, sort_keys=True, ensure_ascii=False)}")
    return "{\n" + ",\n".join(fields) + "\n}\n"


def write(bench: Bench, rows: Rows) -> None:
    """Replace the manifest by one whose own digest is right."""
    (bench.folder / MANIFEST).write_text(sealed(rows))


def packed(data: bytes) -> str:
    """As headers are kept."""
    return "zlib+base64:" + base64.b64encode(zlib.compress(data, 9)).decode()


def file_row(rows: Rows, name: str) -> Rows:
    """The row of one file."""
    return next(row for row in rows["files"] if row["name"] == name)


def reject(needle: str = "manifest", commands: str = WORDS) -> Any:
    """A manifest that must be refused."""
    return attack("reject", "made", commands, needle)


def first_header(rows: Rows) -> str:
    """The name of the first shard whose header is kept."""
    return min(rows["restore"]["headers"])


BOMB = packed(bytes(300_000_000))
CHANGES: dict[str, tuple[str, Callable[[Rows], Any]]] = {
    "version_2": ("A version that nobody knows.", lambda rows: rows.update(version=2)),
    "version_text": ("A version of text.", lambda rows: rows.update(version="1")),
    "version_true": ("A version that equals 1, and is a boolean.", lambda rows: rows.update(version=True)),
    "format_of_another": ("Another format.", lambda rows: rows.update(format="evil")),
    "files_is_a_number": ("`files` is a number.", lambda rows: rows.update(files=7)),
    "files_of_numbers": ("`files` of numbers.", lambda rows: rows.update(files=[1, 2])),
    "tensors_is_an_object": ("`tensors` is an object.", lambda rows: rows.update(tensors={"a": 1})),
    "restore_is_text": ("`restore` is text.", lambda rows: rows.update(restore="x")),
    "file_path": ("A file above the folder.", lambda rows: file_row(rows, ".metadata").update(name="../../outside/secret.txt")),
    "file_absolute": ("A file of the system.", lambda rows: file_row(rows, ".metadata").update(name="/etc/hostname")),
    "file_of_the_parent": ("A file of the parent that is no tracker.", lambda rows: rows["files"].append({"name": "../../outside/secret.txt", "size": 26, "digest": "xxh3-128:" + "0" * 32})),
    "file_with_dots": ("A path that comes back.", lambda rows: file_row(rows, ".metadata").update(name="hf/../.metadata")),
    "file_missing": ("A file that is not there.", lambda rows: rows["files"].append({"name": "ghost", "size": 1, "digest": "xxh3-128:" + "0" * 32})),
    "file_twice": ("A file listed twice.", lambda rows: rows["files"].append(dict(rows["files"][0]))),
    "file_name_is_a_number": ("A name that is a number.", lambda rows: file_row(rows, ".metadata").update(name=0)),
    "file_size_wrong": ("A size that is wrong.", lambda rows: file_row(rows, "common.pt").update(size=1)),
    "file_size_negative": ("A negative size.", lambda rows: file_row(rows, "common.pt").update(size=-1)),
    "file_size_true": ("A size that is a boolean.", lambda rows: file_row(rows, "common.pt").update(size=True)),
    "file_digest_unknown": ("A digest of an unknown kind.", lambda rows: file_row(rows, "common.pt").update(digest="md5:00")),
    "file_digest_is_a_list": ("A digest that is a list.", lambda rows: file_row(rows, "common.pt").update(digest=["x"])),
    "header_path": ("A shard named by a path.", lambda rows: rows["restore"]["headers"].update({"../../owned.safetensors": rows["restore"]["headers"].pop(first_header(rows))})),
    "header_absolute": ("A shard with an absolute name.", lambda rows: rows["restore"]["headers"].update({"/tmp/owned.safetensors": rows["restore"]["headers"].pop(first_header(rows))})),
    "header_hidden": ("A shard named `..`.", lambda rows: rows["restore"]["headers"].update({"..": rows["restore"]["headers"].pop(first_header(rows))})),
    "header_bomb": ("A header that is a zlib bomb of 300 MB.", lambda rows: rows["restore"]["headers"].update({first_header(rows): BOMB})),
    "header_not_base64": ("A header that is no base64.", lambda rows: rows["restore"]["headers"].update({first_header(rows): "zlib+base64:!!!"})),
    "header_not_zlib": ("A header that is no zlib.", lambda rows: rows["restore"]["headers"].update({first_header(rows): "zlib+base64:AAAA"})),
    "header_of_another_kind": ("A header of an unknown packing.", lambda rows: rows["restore"]["headers"].update({first_header(rows): "pickle+base64:gAI="})),
    "header_not_json": ("A header that is no header.", lambda rows: rows["restore"]["headers"].update({first_header(rows): packed(b"[1]")})),
    "header_of_other_tensors": ("A header whose names are those of another model.", lambda rows: rows["restore"]["headers"].update({first_header(rows): packed(b'{"x":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}')})),
    "header_with_huge_shape": ("A header of 10**15 bytes.", lambda rows: rows["restore"]["headers"].update({first_header(rows): packed(b'{"model.norm.weight":{"dtype":"BF16","shape":[500000000000000],"data_offsets":[0,1000000000000000]}}')})),
    "headers_missing_one": ("One shard's header is not there.", lambda rows: rows["restore"]["headers"].pop(first_header(rows))),
    "index_bomb": ("An index that is a zlib bomb.", lambda rows: rows["restore"].update(index=BOMB)),
    "index_path": ("An index that names paths.", lambda rows: rows["restore"].update(index=packed(b'{"weight_map": {"model.norm.weight": "../../owned"}}'))),
    "vocabulary_huge": ("A vocabulary of 10**15.", lambda rows: rows["restore"].update(vocab_size=10**15)),
    "vocabulary_negative": ("A vocabulary of -1.", lambda rows: rows["restore"].update(vocab_size=-1)),
    "vocabulary_text": ("A vocabulary of text.", lambda rows: rows["restore"].update(vocab_size="37")),
    "dtype_is_code": ("A dtype that is code.", lambda rows: rows["restore"].update(dtype="__import__('os').system('true')")),
    "recipe_is_a_path": ("A recipe that is a module's path.", lambda rows: rows.update(recipe="../../outside/evil")),
    "tensor_digest_wrong": ("A tensor's digest that is wrong: right data beside a wrong manifest is an error.", lambda rows: rows["tensors"][0].update(tree="xxh3-128/4MiB:" + "0" * 32)),
    "tensor_unknown": ("A tensor that the checkpoint does not hold.", lambda rows: rows["tensors"].append({"name": "ghost", "dtype": "BF16", "shape": [1], "exact": True, "tree": "xxh3-128/4MiB:" + "0" * 32})),
    "tensor_shape_huge": ("A shape of 10**15.", lambda rows: rows["tensors"][0].update(shape=[10**15, 10**15])),
}  # fmt: skip


def _enter() -> None:
    for name, (said, how) in CHANGES.items():

        def build(bench: Bench, how: Callable[[Rows], Any] = how) -> None:
            rows = load(bench)
            how(rows)
            write(bench, rows)

        build.__name__, build.__doc__ = name, said
        only = (
            "mcore2hf"
            if name.startswith("tensor_")
            else "check"
            if name in ("file_missing", "file_size_wrong")
            else WORDS
        )
        attack("reject", "made", only, "")(build)


_enter()


@reject()
def self_digest_wrong(bench: Bench) -> None:
    """One letter changed, the digest of the file itself left as it was."""
    path = bench.folder / MANIFEST
    path.write_text(path.read_text().replace('"recipe": "llama"', '"recipe": "llamb"', 1))


@reject()
def self_digest_missing(bench: Bench) -> None:
    """No digest of itself."""
    rows = load(bench)
    del rows["self"]
    (bench.folder / MANIFEST).write_text(written(rows))


@reject()
def not_json(bench: Bench) -> None:
    """A manifest cut short."""
    path = bench.folder / MANIFEST
    path.write_text(path.read_text()[:-100])


@reject()
def depth(bench: Bench) -> None:
    """A manifest of brackets."""
    (bench.folder / MANIFEST).write_text("[" * 100_000)


@reject()
def a_list(bench: Bench) -> None:
    """A manifest that is an array."""
    (bench.folder / MANIFEST).write_text("[]")


@reject()
def of_a_terabyte(bench: Bench) -> None:
    """A sparse manifest."""
    with (bench.folder / MANIFEST).open("r+b") as file:
        file.truncate(10**12)


@reject()
def duplicate_key(bench: Bench) -> None:
    """Two recipes."""
    path = bench.folder / MANIFEST
    path.write_text(path.read_text().replace('"recipe"', '"recipe": "evil",\n"recipe"', 1))


@reject()
def links_outside(bench: Bench) -> None:
    """A manifest that is a link outside."""
    path = bench.folder / MANIFEST
    path.rename(bench.outside / MANIFEST)
    path.symlink_to(bench.outside / MANIFEST)


@reject("", "mcore2hf check")
def files_changed_behind_it(bench: Bench) -> None:
    """A side file that is not the one the manifest knows."""
    path = bench.folder / "hf" / "config.json"
    path.write_text(path.read_text() + "\n")


@reject("", "check")
def payload_changed_behind_it(bench: Bench) -> None:
    """A flipped bit in a payload, its zip checksum left alone."""
    path = bench.folder / "__0_0.distcp"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@attack("ok", "made", "mcore2hf check inspect verify")
def untouched(bench: Bench) -> None:
    """The good checkpoint, as the tool made it."""


@attack("ok", "made", "mcore2hf check")
def resealed(bench: Bench) -> None:
    """The good manifest, written here: the digest of itself is as documented."""
    write(bench, load(bench))


@attack("ok", "made", "mcore2hf check")
def unknown_fields(bench: Bench) -> None:
    """Unknown keys are kept, and no error."""
    write(bench, load(bench) | {"note": "\u001b[2J\u202e"})


@attack("ok", "made", "mcore2hf check")
def recipe_is_a_module(bench: Bench) -> None:
    """A recipe's name that is a module's: nothing is imported by it."""
    write(bench, load(bench) | {"recipe": "antigravity"})


@attack("ok", "made", "mcore2hf inspect")
def without(bench: Bench) -> None:
    """No manifest: the export still works."""
    (bench.folder / MANIFEST).unlink()
