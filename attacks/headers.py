"""Safetensors headers as text: repeated keys, depth, encodings, and what is legal though odd."""

from __future__ import annotations

import json

from attacks.bench import Bench
from attacks.case import attack
from attacks.model import model, read_file, table, write_file
from attacks.safetensors_files import FIRST, NORM, QUERY, change, reject

ACCEPTED = "hf2mcore check roundtrip"


@reject()
def duplicate_key(bench: Bench) -> None:
    """The same name twice, with two ranges: readers differ in which they believe."""
    header, data = read_file(bench.first)
    text = json.dumps(header)
    row = json.dumps({NORM: {"dtype": "BF16", "shape": [16], "data_offsets": [0, 32]}})[1:-1]
    write_file(bench.first, text[:-1] + ", " + row + "}", data)


@reject()
def duplicate_key_inside(bench: Bench) -> None:
    """Two shapes in one entry."""
    header, data = read_file(bench.first)
    text = json.dumps(header).replace('"shape": [16, 16]', '"shape": [1, 1], "shape": [16, 16]', 1)
    write_file(bench.first, text, data)


@reject()
def duplicate_key_by_escape(bench: Bench) -> None:
    """The same name twice, once spelled with an escape."""
    header, data = read_file(bench.first)
    text = json.dumps(header)
    row = json.dumps({NORM: header[NORM]})[1:-1].replace("model.", "\\u006dodel.", 1)
    write_file(bench.first, text[:-1] + ", " + row + "}", data)


@reject()
def depth_of_a_hundred_thousand(bench: Bench) -> None:
    """Brackets that overflow a recursive parser."""
    _, data = read_file(bench.first)
    write_file(bench.first, '{"a":' + "[" * 100_000 + "]" * 100_000 + "}", data)


@reject()
def depth_of_braces(bench: Bench) -> None:
    """The same with objects, never closed."""
    _, data = read_file(bench.first)
    write_file(bench.first, '{"a":' * 200_000, data)


@reject()
def metadata_of_depth_65(bench: Bench) -> None:
    """`__metadata__` maps text to text, not to nested lists."""
    header, data = read_file(bench.first)
    deep = "[" * 65 + "]" * 65
    write_file(bench.first, json.dumps(header).replace('"pt"', deep, 1), data)


@reject()
def not_a_number(bench: Bench) -> None:
    """NaN is not JSON."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).replace("[16, 16]", "[NaN, 16]", 1), data)


@reject()
def infinity_as_offset(bench: Bench) -> None:
    """Infinity is not JSON, either."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).replace('"data_offsets": [0,', '"data_offsets": [-Infinity,', 1), data)


@reject()
def number_of_400_digits_exponent(bench: Bench) -> None:
    """1e400 is infinite once it is a float."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).replace("[16, 16]", "[1e400, 16]", 1), data)


@reject()
def not_utf8(bench: Bench) -> None:
    """A header with a byte that is not UTF-8."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).encode().replace(b"pt", b"\xff\xfe", 1), data)


@reject()
def utf16(bench: Bench) -> None:
    """A header in UTF-16, which Python's parser would recognise."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).encode("utf-16"), data)


@reject()
def byte_order_mark(bench: Bench) -> None:
    """A header that begins with a byte order mark."""
    header, data = read_file(bench.first)
    write_file(bench.first, b"\xef\xbb\xbf" + json.dumps(header).encode(), data)


@reject()
def leading_space(bench: Bench) -> None:
    """A header must begin with a brace."""
    header, data = read_file(bench.first)
    write_file(bench.first, " " + json.dumps(header), data)


@reject()
def text_after_the_header(bench: Bench) -> None:
    """Something behind the closing brace."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header) + " {}", data)


@reject()
def metadata_of_numbers(bench: Bench) -> None:
    """`__metadata__` maps text to text."""
    change(bench, lambda header: header.update(__metadata__={"format": 7}))


@reject()
def metadata_is_a_tensor(bench: Bench) -> None:
    """A tensor under the reserved name."""
    change(bench, lambda header: header.update(__metadata__=dict(header[NORM])))


@reject()
def twenty_thousand_strangers(bench: Bench) -> None:
    """Twenty thousand empty tensors that no model has."""
    _, data = read_file(bench.first)
    rows = ",".join(f'"x{number}":{{"dtype":"I8","shape":[0],"data_offsets":[0,0]}}' for number in range(20_000))
    write_file(bench.first, "{" + rows + "}", data)


@reject()
def a_name_of_a_megabyte(bench: Bench) -> None:
    """A name that floods a terminal."""
    change(bench, lambda header: header.update({"x" * 1_000_000: header.pop(NORM)}))


@reject()
def empty_name(bench: Bench) -> None:
    """A tensor without a name."""
    change(bench, lambda header: header.update({"": header.pop(NORM)}))


@reject()
def lone_surrogate_in_a_name(bench: Bench) -> None:
    """A name that cannot be encoded, so printing it fails."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).replace(NORM, NORM + "\\ud800", 1), data)


@attack("ok", "hf", ACCEPTED)
def no_metadata(bench: Bench) -> None:
    """A header without `__metadata__` is legal."""
    change(bench, lambda header: header.pop("__metadata__"))


@attack("ok", "hf", ACCEPTED)
def unpadded_header(bench: Bench) -> None:
    """A header whose length is odd is legal."""
    header, data = read_file(bench.first)
    text = json.dumps(header)
    write_file(bench.first, text + " " * (len(text) % 2 == 0), data)


@attack("ok", "hf", ACCEPTED)
def padded_with_spaces(bench: Bench) -> None:
    """Spaces after the header are legal, and usual."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header) + " " * 501, data)


@attack("ok", "hf", ACCEPTED)
def header_in_any_order(bench: Bench) -> None:
    """The order of the names need not be that of the data."""
    header, data = read_file(bench.first)
    write_file(bench.first, dict(sorted(header.items(), reverse=True)), data)


@attack("ok", "hf", ACCEPTED)
def names_spelled_with_escapes(bench: Bench) -> None:
    """Escapes in a name are legal JSON."""
    header, data = read_file(bench.first)
    write_file(bench.first, json.dumps(header).replace("model.", "\\u006dodel."), data)


@attack("ok", "hf", ACCEPTED)
def one_file_without_index(bench: Bench) -> None:
    """A small model is one `model.safetensors`."""
    for path in (bench.first, bench.second, bench.source / "model.safetensors.index.json"):
        path.unlink()
    write_file(bench.source / "model.safetensors", *table(model()))


@attack("ok", "hf", ACCEPTED)
def metadata_in_unicode(bench: Bench) -> None:
    """Any text may stand in `__metadata__`."""
    change(bench, lambda header: header.update(__metadata__={"format": "pt", "who": "\x1b[31m\u202e\u0000é"}))


@attack("reject", "hf", "hf2mcore plan inspect check", FIRST)
def fortran_order_of_a_pickle(bench: Bench) -> None:
    """A pickle under the name of a shard."""
    bench.first.write_bytes(b"\x80\x02cos\nsystem\nX\x04\x00\x00\x00true\x85R.")


@attack("reject", "hf", "hf2mcore plan inspect check", f"{FIRST}.*git.lfs pull")
def git_lfs_pointer(bench: Bench) -> None:
    """A repository cloned without git-lfs."""
    text = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'4d' * 32}\nsize 4976698672\n"
    bench.first.write_text(text)


@attack("reject", "hf", "hf2mcore plan inspect check", FIRST)
def web_page_instead_of_a_file(bench: Bench) -> None:
    """A download that was refused and saved as HTML."""
    bench.first.write_text("<!DOCTYPE html>\n<html><body>Access denied</body></html>\n" * 20)


@attack("reject", "hf", "hf2mcore plan inspect check", f"{FIRST}.*(gguf|header)")
def gguf_instead_of_safetensors(bench: Bench) -> None:
    """A file of another format."""
    bench.first.write_bytes(b"GGUF\3\0\0\0" + bytes(4096))


@attack("reject", "hf", "hf2mcore plan inspect check", FIRST)
def zip_instead_of_safetensors(bench: Bench) -> None:
    """A torch file under the name of a shard."""
    from attacks.zipping import saved

    bench.first.write_bytes(saved({QUERY: 1}, bytes(512)))
