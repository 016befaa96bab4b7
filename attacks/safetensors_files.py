"""Safetensors headers that lie, bombs in them, and legal oddities that must be accepted."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import read_file, write_file

NORM = "model.layers.0.input_layernorm.weight"
QUERY = "model.layers.0.self_attn.q_proj.weight"
FIRST = "model-00001-of-00002"
HF = "hf2mcore inspect"
Header = dict[str, Any]


def change(bench: Bench, how: Callable[[Header], Any]) -> None:
    """Change the first shard's header in place."""
    header, data = read_file(bench.first)
    how(header)
    write_file(bench.first, header, data)


def reject(needle: str = FIRST) -> Any:
    """A header that no command may believe."""
    return attack("reject", "hf", HF, needle)


@reject()
def length_past_the_end(bench: Bench) -> None:
    """The length field says more than the file holds."""
    header, data = read_file(bench.first)
    write_file(bench.first, header, data, length=len(data) * 10)


@reject()
def length_of_all_ones(bench: Bench) -> None:
    """The length field is 2**64 - 1."""
    header, data = read_file(bench.first)
    write_file(bench.first, header, data, length=2**64 - 1)


@reject()
def length_of_99_megabytes_in_a_small_file(bench: Bench) -> None:
    """A length below the format's limit, but past the end."""
    header, data = read_file(bench.first)
    write_file(bench.first, header, data, length=99_000_000)


@reject()
def header_above_the_limit(bench: Bench) -> None:
    """A header of 200 MB in a sparse file of that size."""
    header, data = read_file(bench.first)
    write_file(bench.first, header, data, length=200_000_000)
    with bench.first.open("r+b") as file:
        file.truncate(300_000_000)


@reject()
def header_of_zeros_at_the_limit(bench: Bench) -> None:
    """A header of 99 MB of NUL bytes."""
    header, data = read_file(bench.first)
    write_file(bench.first, header, data, length=99_000_000)
    with bench.first.open("r+b") as file:
        file.truncate(100_000_000)


@reject()
def length_zero(bench: Bench) -> None:
    """A header of no bytes."""
    bench.first.write_bytes(bytes(8))


@reject()
def seven_bytes(bench: Bench) -> None:
    """A file too short for a length."""
    bench.first.write_bytes(bytes(7))


@reject()
def empty_file(bench: Bench) -> None:
    """A file of no bytes."""
    bench.first.write_bytes(b"")


@reject()
def length_one_short(bench: Bench) -> None:
    """The closing brace belongs to the data."""
    header, data = read_file(bench.first)
    write_file(bench.first, header, data, length=len(json.dumps(header)) - 1)


@reject()
def overlap(bench: Bench) -> None:
    """Two tensors share their bytes."""
    change(bench, lambda header: header[NORM].update(data_offsets=[0, 32]))


@reject()
def hole(bench: Bench) -> None:
    """Sixteen bytes between two tensors belong to none."""
    header, data = read_file(bench.first)
    rows = [row for name, row in header.items() if name != "__metadata__"]
    for row in rows[1:]:
        row["data_offsets"] = [place + 16 for place in row["data_offsets"]]
    cut = rows[0]["data_offsets"][1]
    write_file(bench.first, header, data[:cut] + bytes(16) + data[cut:])


@reject()
def hole_at_the_start(bench: Bench) -> None:
    """The first tensor does not begin at 0."""
    header, data = read_file(bench.first)
    for name, row in header.items():
        if name != "__metadata__":
            row["data_offsets"] = [place + 8 for place in row["data_offsets"]]
    write_file(bench.first, header, bytes(8) + data)


@reject()
def trailing_bytes(bench: Bench) -> None:
    """Bytes after the last tensor."""
    with bench.first.open("ab") as file:
        file.write(b"trailing")


@reject()
def truncated_data(bench: Bench) -> None:
    """The last byte is missing, as after a broken copy."""
    bench.first.write_bytes(bench.first.read_bytes()[:-1])


@reject()
def offset_past_the_end(bench: Bench) -> None:
    """A range that ends behind the file."""
    change(bench, lambda header: header[QUERY].update(data_offsets=[0, 10**15]))


@reject()
def offsets_backwards(bench: Bench) -> None:
    """A range that ends before it begins."""
    change(bench, lambda header: header[QUERY]["data_offsets"].reverse())


@reject()
def offsets_negative(bench: Bench) -> None:
    """A negative offset."""
    change(bench, lambda header: header[QUERY].update(data_offsets=[-32, 0]))


@reject()
def shape_disagrees_with_bytes(bench: Bench) -> None:
    """Twice as many rows as the bytes hold."""
    change(bench, lambda header: header[QUERY].update(shape=[32, 16]))


@reject()
def shape_overflows_64_bits(bench: Bench) -> None:
    """2**63 * 2 * 16 elements: the product is 0 in 64 bits."""
    change(bench, lambda header: header[QUERY].update(shape=[2**62, 2, 2, 2], data_offsets=[0, 0]))


@reject()
def shape_wraps_to_the_right_size(bench: Bench) -> None:
    """A shape whose byte count is right modulo 2**64."""
    change(bench, lambda header: header[QUERY].update(shape=[2**63 + 128, 2]))


@reject()
def shape_of_huge_numbers_and_zero(bench: Bench) -> None:
    """A dimension of 0 hides the others."""
    change(bench, lambda header: header[QUERY].update(shape=[0, 10**30], data_offsets=[0, 0]))


@reject()
def shape_negative_twice(bench: Bench) -> None:
    """Two negative sizes, their product right."""
    change(bench, lambda header: header[QUERY].update(shape=[-16, -16]))


@reject()
def shape_of_floats(bench: Bench) -> None:
    """16.0 is not an integer."""
    change(bench, lambda header: header[QUERY].update(shape=[16.0, 16]))


@reject()
def shape_with_exponent(bench: Bench) -> None:
    """1.6e1 is not an integer, either."""
    text = bench.first.read_bytes()
    size = int.from_bytes(text[:8], "little")
    head = text[8 : 8 + size].replace(b'"shape": [16, 16]', b'"shape": [1.6e1, 16]', 1)
    write_file(bench.first, head, text[8 + size :])


@reject()
def shape_of_booleans(bench: Bench) -> None:
    """`true` is not 1."""
    change(bench, lambda header: header[NORM].update(shape=[True, 16]))


@reject()
def shape_of_text(bench: Bench) -> None:
    """A shape of strings."""
    change(bench, lambda header: header[QUERY].update(shape=["16", "16"]))


@reject()
def shape_of_a_hundred_thousand_ones(bench: Bench) -> None:
    """More dimensions than any array library takes."""
    change(bench, lambda header: header[NORM].update(shape=[16] + [1] * 100_000))


@reject()
def shape_of_a_ten_thousand_digit_number(bench: Bench) -> None:
    """An integer too long to convert in good time."""
    header, data = read_file(bench.first)
    text = json.dumps(header).replace("[16, 16]", "[" + "9" * 10_000 + ", 16]", 1)
    write_file(bench.first, text, data)


@reject()
def three_offsets(bench: Bench) -> None:
    """A range of three numbers."""
    change(bench, lambda header: header[QUERY]["data_offsets"].append(1))


@reject()
def no_dtype(bench: Bench) -> None:
    """A tensor without dtype."""
    change(bench, lambda header: header[QUERY].pop("dtype"))


@reject()
def unknown_dtype(bench: Bench) -> None:
    """A dtype that the format does not have."""
    change(bench, lambda header: header[QUERY].update(dtype="BF17"))


@reject()
def dtype_is_a_list(bench: Bench) -> None:
    """A dtype that cannot be looked up in a table."""
    change(bench, lambda header: header[QUERY].update(dtype=["BF16"]))


@reject()
def unknown_field(bench: Bench) -> None:
    """A tensor with a field of its own, which another reader may believe."""
    change(bench, lambda header: header[QUERY].update(strides=[1, 16]))


@reject()
def entry_is_a_list(bench: Bench) -> None:
    """A tensor that is not an object."""
    change(bench, lambda header: header.update({QUERY: [1, 2]}))


@reject()
def header_is_a_list(bench: Bench) -> None:
    """A header that is an array."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps([header]), data)
