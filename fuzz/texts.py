"""Edits of text files: a line dropped, doubled or moved, a value replaced by one that its reader may stumble over."""

from __future__ import annotations

from random import Random

YAML = (
    *"""!!int ''
!!int x
!!int +
!!int 0b
!!float ''
!!float x
!!bool maybe
!!null x
!!timestamp x
2001-99-99
2001-01-01T99:99:99
0001-01-01T00:00:00+23:59
!!binary é
!!binary a
!!set {a, b}
!!omap [a]
!!pairs [a]
&a [*a]
&a {x: *a}
*b
&b 1
&c [*b,*b]
? [1]
{<<: 1}
{<<: [1]}
1e999
.nan
-.inf
0x
0o8
1:99:99
190:20:30:1:1:1
~
[]
{}
true
!!python/object/apply:os.system [true]
%TAG
---
-1
4611686018427387904
''
'
"\\ud800"
|
>
!!str 1
!!map 1""".splitlines(),
    *("1" * 5000, "[" * 300, "{a: " * 300, "- " * 300, "\t", "\u2028"),
)
TRACKERS = (
    b"release", b"0", b"1", b"-1", b"+0", b"0000000", b"00", b" 0 ", b"\n0", b"0\n", b"9" * 64, b"1" * 63, b"0 0",
    b"../x", b"\xb2", b"\xd9\xa0", b"1_0", b"0x0", b"\0", b"Release", b"release\0", b"0.0", b"iter_0000000",
)  # fmt: skip


def yaml(rng: Random, data: bytes) -> bytes:
    """One to three edits of lines."""
    lines = data.decode("utf-8", "replace").split("\n")
    for _ in range(rng.choice((1, 1, 2, 3))):
        _line(rng, lines, rng.randrange(len(lines)))
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def _line(rng: Random, lines: list[str], at: int) -> None:
    kind, (key, colon, _) = rng.randrange(6), lines[at].partition(":")
    if kind == 0 and len(lines) > 1:
        del lines[at]
    elif kind == 1:
        lines.insert(rng.randrange(len(lines)), lines[at])
    elif kind == 2:
        lines[at] = rng.choice((" ", "  ", "- ", "? ", "\t")) + lines[at]
    else:
        lines[at] = f"{key}{colon} {rng.choice(YAML)}" if colon and kind < 5 else rng.choice(YAML)


def tracker(rng: Random, data: bytes) -> bytes:
    """A known text, or one joined with the input."""
    return rng.choice(TRACKERS) + (data if rng.random() < 0.3 else b"")
