"""Edits of pickles that keep the stream in step: an opcode dropped, doubled, moved, inserted or given another value."""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from random import Random

Op = bytes  # an opcode with its argument
LONG = b"\x8a\x08\xff\xff\xff\xff\xff\xff\xff\x7f", b"\x8a\x09" + b"\0" * 8 + b"\x01", b"\x8a\x01\xff", b"\x8a\0"
NAMES = (
    b"ctorch\nSize\n",
    b"ctorch\nbfloat16\n",
    b"ccollections\nOrderedDict\n",
    b"c_codecs\nencode\n",
    b"cbuiltins\neval\n",
    b"ctorch\nFloatStorage\n",
    b"ctorch._utils\n_rebuild_tensor_v2\n",
)
COMMON = (
    *(b"N", b"\x88", b"\x89", b")", b"]", b"}", b"(", b"t", b"\x85", b"\x86", b"\x87", b"R", b"\x81", b"b", b"s", b"u"),
    *(b"a", b"e", b"0", b"1", b"2", b"Q", b"K\0", b"K\1", b"M\xff\xff", b"J\xff\xff\xff\xff", b"h\0", b"h\1", b"q\0"),
    *(b"j\0\0\0\0", b"r\xff\xff\xff\xff", b"\x94", b"X\0\0\0\0", b"X\x01\0\0\0a", b"\x8c\0", b"\x93", b"C\0"),
    *(b"B\0\0\0\0", b"G\x7f\xf8\0\0\0\0\0\0", b"\x80\x02", b"\x95" + b"\0" * 8, b"\x8c\x02.."),
    b"X\x03\0\0\0\xed\xa0\x80",
    *LONG,
    *NAMES,
)  # fmt: skip


def split(data: bytes) -> list[Op]:
    """The opcodes of a pickle, frames left out. Raises ValueError and others for what is not one."""
    found = [(op, at) for op, _, at in pickletools.genops(data)]
    ends = [at for _, at in found[1:]] + [len(data)]
    return [data[at:end] for (op, at), end in zip(found, ends, strict=True) if op.name != "FRAME"]


def mutate(rng: Random, data: bytes) -> bytes:
    """One to three edits. Raises an error for what is not a pickle."""
    ops = split(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(ops)) if ops else 0
        rng.choice(EDITS)(rng, ops, at)
    return b"".join(ops)


def _drop(rng: Random, ops: list[Op], at: int) -> None:
    del ops[at : at + rng.choice((1, 1, 1, 2, 3))]


def _double(rng: Random, ops: list[Op], at: int) -> None:
    part = ops[at : at + rng.choice((1, 1, 2, 5, 20))]
    place = rng.choice((at, rng.randrange(len(ops) + 1)))
    ops[place:place] = part * rng.choice((1, 1, 1, 2, 70))


def _swap(rng: Random, ops: list[Op], at: int) -> None:
    if ops:
        other = rng.choice((max(0, at - 1), rng.randrange(len(ops))))
        ops[at], ops[other] = ops[other], ops[at]


def _insert(rng: Random, ops: list[Op], at: int) -> None:
    ops.insert(at, rng.choice(COMMON))


def _replace(rng: Random, ops: list[Op], at: int) -> None:
    ops[at : at + 1] = [rng.choice(COMMON)]


def _argument(rng: Random, ops: list[Op], at: int) -> None:
    """Another value for an integer or text; another byte for the rest."""
    if not ops or not ops[at]:
        return
    op, text = ops[at], ops[at]
    if op[:1] in (b"K", b"M", b"J", b"\x8a"):
        ops[at] = rng.choice((b"K\0", b"K\1", b"K\2", b"K" + bytes([rng.randrange(256)]), b"M\0\1", *LONG))
    elif len(text) > 2:
        place = rng.randrange(1, len(text))
        ops[at] = op[:place] + bytes([rng.choice((0, 0x2E, 0x2F, 0xFF, rng.randrange(256)))]) + op[place + 1 :]


EDITS: tuple[Callable[[Random, list[Op], int], None], ...] = (
    _drop, _double, _swap, _insert, _replace, _argument, _argument, _argument,
)  # fmt: skip
