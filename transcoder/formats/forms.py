"""Pickled records of which many are written: what they have in common is compiled once, into opcodes.

Most of a record's opcodes repeat; but after every value stands the number of its memo slot, which counts on. A
compiled stretch is therefore one integer, in which adding 1 to every slot number is adding another integer.
"""

from __future__ import annotations

from dataclasses import dataclass

from transcoder.formats.pickled import SAVERS, Record, Writer, integers


class Hole:
    """What stands in a form where its records differ."""


HOLE = Hole()


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """A record with holes and without a state. Forms are told apart by identity: make each once."""

    record: Record


@dataclass(frozen=True, slots=True)
class Filled:
    """The record of a form with these values in its holes, in order."""

    form: Form
    values: tuple[object, ...]


class Sizes(tuple[int, ...]):
    """A tuple of integers, written without asking of each what it is."""


_Stretch = tuple[int, int, int, int]  # opcodes as an integer, 1 at each slot number, bytes, slots


class _Recorder(Writer):
    """Notes opcodes up to each hole, slots counted from 0, with the names that a writer has written."""

    __slots__ = ("slots", "stretches")

    def __init__(self, writer: Writer) -> None:
        super().__init__(writer.protocol)
        self.memo, self.names = writer.memo, writer.names
        self.slots, self.stretches = 0, list[_Stretch]()

    def container(self) -> None:
        """A slot number of four bytes."""
        if self.protocol < 4:
            self.slots |= 1 << 8 * (len(self.out) + 1)
            self.out.extend(b"r" + self.count.to_bytes(4, "little"))
            self.count += 1

    def cut(self) -> None:
        """The stretch ends here."""
        self.stretches.append((int.from_bytes(self.out, "little"), self.slots, len(self.out), self.count))
        self.out, self.slots, self.count = bytearray(), 0, 0


def _save_filled(w: Writer, value: Filled) -> None:
    """The first ones are written in full: names are not known yet, or slot numbers have one byte."""
    stretches: tuple[_Stretch, ...] | None = w.forms.get(value.form)
    if stretches is None:
        w.save(_plain(value.form.record, list(value.values[::-1])))
        if w.count >= 256:
            w.forms[value.form] = _compiled(w, value.form.record)
        return
    for (opcodes, slots, size, count), item in zip(stretches, (*value.values, _END), strict=True):
        w.out.extend((opcodes + slots * w.count).to_bytes(size, "little"))
        w.count += count
        if item is not _END:
            w.save(item)


_END = Hole()


def _compiled(writer: Writer, record: Record) -> tuple[_Stretch, ...]:
    recorder = _Recorder(writer)
    recorder.save(record)
    recorder.cut()
    return tuple(recorder.stretches)


def _plain(value: object, rest: list[object]) -> object:
    """The value with what `rest` ends with in its holes, the last first."""
    if value is HOLE:
        return rest.pop()
    if isinstance(value, Record):
        return Record(value.callable, tuple(_plain(item, rest) for item in value.args))
    return tuple(_plain(item, rest) for item in value) if type(value) is tuple else value


def _save_sizes(w: Writer, value: Sizes) -> None:
    w.out.extend(integers(value))
    if value:
        w.container()


def _save_hole(recorder: _Recorder, _: Hole) -> None:
    recorder.cut()


SAVERS |= {Hole: _save_hole, Filled: _save_filled, Sizes: _save_sizes}
