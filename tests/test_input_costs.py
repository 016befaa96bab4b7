"""Large hostile inputs cost time and memory in proportion to their size: seconds of processor time, at most 256 MiB."""

from __future__ import annotations

import contextlib
import json

import pytest

from fuzz import judge, limits, zipping
from fuzz.targets import TARGETS
from transcoder.errors import InputError
from transcoder.formats.torch_dist import check_tiling
from transcoder.spec import Box

COUNT = 60_000


def repeated_key(head: str, tail: str) -> bytes:
    """An object of many keys of which the last occurs twice."""
    rows = ",".join(f'"k{i}":0' for i in range(COUNT))
    return f'{head}{{{rows},"k{COUNT - 1}":0}}{tail}'.encode()


def header(text: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text


def bricks(rows: int) -> list[Box]:
    """Rows cut in two, each at another place: a tiling, but no grid."""
    cuts = [(row, 5 + row % 3) for row in range(rows)]
    return [((row, row + 1), part) for row, cut in cuts for part in ((0, cut), (cut, 10))]


def yaml_aliases(depth: int) -> bytes:
    """Lists of nine aliases each, 9 ** depth values when they are written out."""
    rows = [f"  a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, depth)]
    return "\n".join(["model:", "  a0: &a0 [1, 1]", *rows, f"  num_layers: *a{depth - 1}"]).encode()


def yaml_merges(depth: int) -> bytes:
    """Tables that merge nine others each."""
    rows = [f"  a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}" for i in range(1, depth)]
    return "\n".join(["model:", "  a0: &a0 {x: 1}", *rows]).encode()


INPUTS = {
    "a key twice, index": ("index", lambda: repeated_key('{"weight_map":', "}")),
    "a key twice, header": ("safetensors", lambda: header(repeated_key("", ""))),
    "a key twice, config": ("config", lambda: repeated_key('{"a":', "}")),
    "many bad names": ("index", lambda: json.dumps({"weight_map": {f"k{i}": "/" for i in range(COUNT)}}).encode()),
    "many files": ("index", lambda: json.dumps({"weight_map": {f"k{i}": f"f{i}" for i in range(COUNT)}}).encode()),
    "long numbers": ("config", lambda: b'{"a": [%b]}' % b",".join([b"9" * 4000] * 200)),
    "a long number": ("config", lambda: b'{"a": %b.0}' % (b"9" * 1_000_000)),
    "deep lists": ("index", lambda: b'{"weight_map":' + b"[" * 1_000_000),
    "many pairs": ("metadata", lambda: b"\x80\x02}(" + b"X\1\0\0\0aN" * COUNT + b"u."),
    "deep tuples": ("pickle", lambda: b"\x80\x02)" + b"\x85" * 500_000 + b"."),
    "doubled tuples": ("pickle", lambda: b"\x80\x02)" + b"q\0h\0\x86" * 100_000 + b"."),
    "marks": ("pickle", lambda: b"\x80\x02" + b"(" * 500_000 + b"."),
    "many records": ("item", lambda: zipping.joined([(f"a/{i}", b"") for i in range(8000)])),
    "yaml aliases": ("run_config", lambda: yaml_aliases(30)),
    "yaml merges": ("run_config", lambda: yaml_merges(12)),
    "yaml brackets": ("run_config", lambda: b"[" * 100_000),
}  # fmt: skip


@pytest.mark.parametrize("name", INPUTS)
def test_a_large_hostile_input_is_decided_in_seconds(name, monkeypatch):
    monkeypatch.setattr(limits, "SECONDS", 6.0)
    target, make = INPUTS[name]
    assert judge.finding(TARGETS[target], make()) == ""


def test_chunks_that_are_no_grid_cost_no_more_than_their_number_allows():
    with limits.bounded(seconds=2.0):
        check_tiling("w", (200, 10), bricks(200))
        with contextlib.suppress(InputError):
            check_tiling("w", (2040, 10), bricks(2040))
    with pytest.raises(InputError, match="do not tile"):
        check_tiling("w", (200, 10), [*bricks(200)[:-1], bricks(200)[0]])
