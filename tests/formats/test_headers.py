"""Headers in the usual spelling are read as those in any other; nothing unusual passes for usual."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from transcoder.formats import safetensors
from transcoder.formats.safetensors import emit_header, shard_tensors, usual_tensors
from transcoder.spec import DTYPES, DType

NAMES = st.text(st.sampled_from('abz.0"\\/{}[],: é\x7f\u2028'), max_size=6) | st.just("__metadata__")
TENSORS = st.dictionaries(
    NAMES, st.tuples(st.sampled_from(list(DTYPES.values())), st.lists(st.integers(0, 9), max_size=4).map(tuple))
)
METADATA = st.dictionaries(st.text(max_size=3), st.text(max_size=4), max_size=2)


def outcome(header: bytes, size: int) -> Any:
    """The tensors, or that they were refused."""
    try:
        return [(spec.name, spec.dtype, spec.shape, spec.chunks) for spec in shard_tensors("file", header, size)]
    except (ValueError, TypeError, RecursionError) as error:
        return type(error), str(error)


def slowly(header: bytes, size: int) -> Any:
    """The same with the strict reader alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safetensors, "usual_tensors", lambda file, header: [])
        return outcome(header, size)


def payload(header: bytes) -> int:
    """The bytes that the last tensor ends at, as far as a header says so."""
    try:
        table = json.loads(header[8:])
        return max((entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"), default=0)
    except (ValueError, TypeError, KeyError, AttributeError, IndexError):
        return 0


@given(TENSORS, METADATA)
def test_both_readers_agree_on_valid_headers(tensors: dict[str, tuple[DType, Any]], metadata: dict[str, str]) -> None:
    tensors.pop("__metadata__", None)
    header = emit_header(((name, dtype, shape) for name, (dtype, shape) in tensors.items()), metadata)
    size = len(header) + payload(header)
    found = outcome(header, size)
    assert isinstance(found, list)
    assert found == slowly(header, size)
    plain = all(not set(name) & set('"\\') for name in tensors) and not any(
        set("{}") & set(v) for v in metadata.values()
    )
    if tensors and plain and not any(set("{}") & set(key) for key in metadata):
        assert len(usual_tensors("file", header)) == len(tensors)


EDITS = st.lists(
    st.tuples(st.integers(0, 400), st.integers(0, 2), st.sampled_from([*b'0-1 9",:{}[]a\\\n\t.eN', 0xFF, 0xC3])),
    max_size=2,
)


@settings(max_examples=400)
@given(TENSORS, METADATA, EDITS)
def test_both_readers_agree_on_changed_headers(
    tensors: dict[str, tuple[DType, Any]], metadata: dict[str, str], edits: list[tuple[int, int, int]]
) -> None:
    text = bytearray(emit_header(((name, *tensor) for name, tensor in tensors.items()), metadata)[8:])
    for place, removed, byte in edits:
        text[place % len(text) : place % len(text) + removed] = bytes([byte])
    header = len(text).to_bytes(8, "little") + bytes(text)
    assert outcome(header, len(header) + payload(header)) == slowly(header, len(header) + payload(header))


ENTRY = '"a":{"dtype":"U8","shape":[2],"data_offsets":[0,2]}'


@pytest.mark.parametrize(
    "text",
    [
        "{" + ENTRY + "," + ENTRY + "}",
        "{" + ENTRY + ',"__metadata__":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}}',
        "{" + ENTRY + "}}",
        "{" + ENTRY + ",}",
        '{"__metadata__":{"k":"v","k":"w"},' + ENTRY + "}",
        '{"__metadata__":{"k":1},' + ENTRY + "}",
        "{" + ENTRY.replace("[2]", "[02]") + "}",
        "{" + ENTRY.replace("[2]", "[2,]") + "}",
        "{" + ENTRY.replace("[2]", "[,2]") + "}",
        "{" + ENTRY.replace("[2]", "[" + ",".join("1" * 17) + ",2]") + "}",
        "{" + ENTRY.replace("[2]", "[" + "9" * 5000 + ",0]") + "}",
        "{" + ENTRY.replace("[2]", f"[{1 << 60},{1 << 60},0]").replace("[0,2]", "[0,0]") + "}",
        "{" + ENTRY.replace("[0,2]", "[0,3]") + "}",
        "{" + ENTRY.replace("[0,2]", "[00,2]") + "}",
        "{" + ENTRY.replace("U8", "U9") + "}",
        "{" + ENTRY.replace('"a"', '"\x01"') + "}",
        "{" + ENTRY.replace('"a"', '"\\ud800"') + "}",
        "{}",
    ],
)
def test_what_is_wrong_or_unusual_is_left_to_the_strict_reader(text: str) -> None:
    header = (8).to_bytes(8, "little") + text.encode()
    assert usual_tensors("file", header) == []
    assert outcome(header, len(header) + 2) == slowly(header, len(header) + 2)


def test_the_usual_spelling_is_read_without_the_strict_reader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(safetensors, "_any_tensors", None)
    header = (8).to_bytes(8, "little") + ("{" + ENTRY + "}   ").encode()
    assert [spec.nbytes for spec in shard_tensors("file", header, len(header) + 2)] == [2]
