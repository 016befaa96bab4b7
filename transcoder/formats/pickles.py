"""Reads pickles as inert data, without importing, calling or hashing anything; `dumps` of `pickled` writes them.

Opcodes and their meaning: CPython's Lib/pickletools.py. The opcodes read are those that the picklers of CPython and
torch emit for checkpoints; the rest is refused. A name becomes a `Global`, a call a `Record`, a dict a list of pairs.
What `loads` returns is at most 64 values deep, has no cycles, and takes a number of steps linear in the pickle's
length to walk, so that callers may recurse, compare and hash.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence

from transcoder.errors import InputError, refuse
from transcoder.formats.pickled import ENCODE, INT_LIMIT, SIZE, Global, Pairs, Persistent, Record, brief, dumps

__all__ = ["Global", "Names", "Pairs", "Persistent", "Record", "dumps", "loads"]

STRING_LIMIT = 1 << 16
LEVELS = 128  # 64 nested values; a dict counts as two levels, itself and its pairs
Names = frozenset[tuple[str, str]]


def loads(data: bytes | memoryview, names: Names | None, subject: str) -> object:
    """The value that `data` describes; `names` is the closed set of globals, None admits all.

    >>> loads(b"\\x80\\x02}X\\x01\\x00\\x00\\x00aK\\x07s.", frozenset(), "file")
    [('a', 7)]
    """
    return measured(data, names, subject)[0]


def measured(data: bytes | memoryview, names: Names | None, subject: str) -> tuple[object, int]:
    """The same, and how many bytes of `data` it took."""
    machine = _Machine(bytes(data), names)
    try:
        value = machine.run()
    except InputError as error:
        raise refuse("pickle", f"{subject}: {error.args[0]} (byte {machine.pos})") from None
    except (ArithmeticError, LookupError, TypeError, ValueError, struct.error) as error:
        raise refuse("pickle", f"{subject}: the pickle is cut off or damaged at byte {machine.pos}") from error
    if not _bounded(value, 4 * len(data) + 1024):
        raise refuse("pickle", f"{subject}: the pickled value is nested too deeply, contains itself or repeats itself")
    return value, machine.pos + 1


_CALLED = {(known.module, known.name): known for known in (SIZE, ENCODE)}  # told apart by identity


class _Machine:
    """State of the interpreter: `stack` holds what was pushed since the last mark, `marks` the stacks below."""

    __slots__ = ("data", "marks", "memo", "names", "pos", "stack")

    def __init__(self, data: bytes, names: Names | None) -> None:
        self.data, self.names, self.pos = data, names, 0
        self.stack: list[object] = []
        self.marks: list[list[object]] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """Interpret up to STOP."""
        data, handlers = self.data, HANDLERS
        while (code := data[self.pos]) != 0x2E:
            self.pos += 1
            handlers[code](self)
        if self.marks or len(self.stack) != 1:
            raise refuse("pickle", "the pickle does not end with one value")
        return self.stack[0]

    def take(self, count: int, limit: int = STRING_LIMIT) -> bytes:
        """The next `count` bytes."""
        start, self.pos = self.pos, self.pos + count
        if count > limit or self.pos > len(self.data):
            raise refuse("pickle", f"a field of {count} bytes exceeds the pickle or the limit of {limit}")
        return self.data[start : self.pos]

    def size(self, width: int) -> int:
        """The next `width` bytes as an unsigned length or index."""
        return int.from_bytes(self.take(width), "little")

    def line(self) -> str:
        """The text up to the next line feed."""
        end = self.data.index(b"\n", self.pos, self.pos + STRING_LIMIT)
        start, self.pos = self.pos, end + 1
        return self.data[start:end].decode()

    def since_mark(self) -> list[object]:
        """Everything pushed since the last mark, which is removed."""
        found, self.stack = self.stack, self.marks.pop()
        return found

    def put(self, index: int) -> None:
        """Remember the top of the stack."""
        if index > len(self.data):
            raise refuse("pickle", f"memo index {index} is larger than the pickle")
        self.memo[index] = self.stack[-1]

    def name(self, module: object, name: object) -> Global:
        """A global, if it is allowed."""
        if type(module) is not str or type(name) is not str:
            raise refuse("pickle", "a name is not a string")
        if self.names is not None and (module, name) not in self.names:
            raise refuse("pickle", f"the name {brief(f'{module}.{name}')} is not allowed")
        return _CALLED.get((module, name)) or Global(module, name)


def _rare(m: _Machine) -> None:
    raise refuse("pickle", f"opcode {m.data[m.pos - 1]:#04x} is not accepted")


Handler = Callable[[_Machine], None]
HANDLERS: list[Handler] = [_rare] * 256


def _opcode(code: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        HANDLERS[ord(code)] = handler
        return handler

    return register


def _push(code: str, make: Callable[[_Machine], object]) -> None:
    def handler(m: _Machine) -> None:
        value = make(m)  # may replace m.stack
        m.stack.append(value)

    HANDLERS[ord(code)] = handler


_push("N", lambda m: None)
_push("\x88", lambda m: True)
_push("\x89", lambda m: False)
_push(")", lambda m: ())
_push("]", lambda m: [])
_push("}", lambda m: Pairs())
_push("\x8a", lambda m: int.from_bytes(m.take(m.size(1), INT_LIMIT), "little", signed=True))
_push("G", lambda m: struct.unpack(">d", m.take(8))[0])
_push("X", lambda m: m.take(m.size(4)).decode("utf-8", "surrogatepass"))
_push("C", lambda m: m.take(m.size(1)))
_push("B", lambda m: m.take(m.size(4)))
_push("c", lambda m: m.name(m.line(), m.line()))
_push("t", lambda m: tuple(m.since_mark()))
_push("Q", lambda m: Persistent(m.stack.pop()))


_HALF, _WORD = struct.Struct("<H").unpack_from, struct.Struct("<I").unpack_from
_SIGNED = struct.Struct("<i").unpack_from


@_opcode("K")
def _byte(m: _Machine) -> None:
    m.stack.append(m.data[m.pos])
    m.pos += 1


@_opcode("M")
def _half(m: _Machine) -> None:
    m.stack += _HALF(m.data, m.pos)
    m.pos += 2


@_opcode("J")
def _signed(m: _Machine) -> None:
    m.stack += _SIGNED(m.data, m.pos)
    m.pos += 4


@_opcode("q")
def _put(m: _Machine) -> None:
    m.put(m.data[m.pos])
    m.pos += 1


@_opcode("r")
def _long_put(m: _Machine) -> None:
    m.put(_WORD(m.data, m.pos)[0])
    m.pos += 4


@_opcode("j")
def _long_get(m: _Machine) -> None:
    m.stack.append(m.memo[_WORD(m.data, m.pos)[0]])
    m.pos += 4


@_opcode("\x8c")
def _short_text(m: _Machine) -> None:
    m.pos, start = (end := m.pos + 1 + m.data[m.pos]), m.pos + 1
    if end > len(m.data):
        raise refuse("pickle", "a string is longer than the pickle")
    m.stack.append(m.data[start:end].decode("utf-8", "surrogatepass"))


@_opcode("h")
def _get(m: _Machine) -> None:
    m.stack.append(m.memo[m.data[m.pos]])
    m.pos += 1


@_opcode("\x94")
def _memoize(m: _Machine) -> None:
    m.memo[len(m.memo)] = m.stack[-1]


@_opcode("(")
def _mark(m: _Machine) -> None:
    m.marks.append(m.stack)
    m.stack = []


@_opcode("\x85")
def _tuple1(m: _Machine) -> None:
    m.stack[-1] = (m.stack[-1],)


@_opcode("\x86")
def _tuple2(m: _Machine) -> None:
    last = m.stack.pop()
    m.stack[-1] = (m.stack[-1], last)


@_opcode("\x87")
def _tuple3(m: _Machine) -> None:
    last, middle = m.stack.pop(), m.stack.pop()
    m.stack[-1] = (m.stack[-1], middle, last)


@_opcode("\x80")
def _protocol(m: _Machine) -> None:
    if (number := m.size(1)) > 5:
        raise refuse("pickle", f"protocol {number} is newer than 5")


@_opcode("\x95")
def _frame(m: _Machine) -> None:
    if m.size(8) > len(m.data) - m.pos:
        raise refuse("pickle", "a frame is longer than the pickle")


@_opcode("\x93")
def _stack_global(m: _Machine) -> None:
    name = m.stack.pop()
    m.stack[-1] = m.name(m.stack[-1], name)


@_opcode("\x81")
def _new(m: _Machine) -> None:
    args = m.stack.pop()
    target = m.stack[-1]
    if type(target) is not Global or type(args) is not tuple:
        raise refuse("pickle", "something is called that is not a name")
    m.stack[-1] = Record(target, args)


@_opcode("R")
def _reduce(m: _Machine) -> None:
    args = m.stack[-1]
    target = m.stack[-2]
    if target is SIZE and type(args) is tuple:
        m.stack[-2:] = [_size(args)]
    elif target is ENCODE and type(args) is tuple:
        m.stack[-2:] = [_encode(args)]
    else:
        _new(m)


def _size(args: tuple[object, ...]) -> tuple[object, ...]:
    if len(args) != 1 or type(args[0]) is not tuple or any(type(extent) is not int for extent in args[0]):
        raise refuse("pickle", "torch.Size is not made of integers")
    return args[0]


def _encode(args: tuple[object, ...]) -> bytes:
    if len(args) != 2 or type(args[0]) is not str or args[1] != "latin1":
        raise refuse("pickle", "bytes are not written as latin1 text")
    return args[0].encode("latin1")


@_opcode("b")
def _build(m: _Machine) -> None:
    state = m.stack.pop()
    record = m.stack[-1]
    if type(record) is not Record or record.state is not None:
        raise refuse("pickle", "a state is given to something that takes none")
    record.state = state


def _extend(m: _Machine, values: list[object]) -> None:
    target = m.stack[-1]
    if type(target) is not list:
        raise refuse("pickle", "a value is appended to something that is not a list")
    target += values


@_opcode("s")
def _setitem(m: _Machine) -> None:
    value, key = m.stack.pop(), m.stack.pop()
    _pairs(m).append((key, value))


@_opcode("u")
def _setitems(m: _Machine) -> None:
    values = m.since_mark()
    if len(values) % 2:
        raise refuse("pickle", "a dict key has no value")
    _pairs(m).extend(zip(values[::2], values[1::2], strict=True))


def _pairs(m: _Machine) -> Pairs:
    target = m.stack[-1]
    if type(target) is Record:
        target.items = Pairs() if target.items is None else target.items
        return target.items
    if type(target) is not Pairs:
        raise refuse("pickle", "an item is put into something that is not a dict")
    return target


HANDLERS[ord("a")] = lambda m: _extend(m, [m.stack.pop()])
HANDLERS[ord("e")] = lambda m: _extend(m, m.since_mark())
_INNER = frozenset({tuple, list, Pairs, Record, Persistent})


def _bounded(root: object, budget: int) -> bool:
    """Whether `root` has few levels and few values, counting a shared value at each place where it appears."""
    level = [root]
    for _ in range(LEVELS):
        below: list[object] = []
        for parent in level:
            below += _children(parent)
            if len(below) > budget:
                return False
        budget -= len(below)
        level = [value for value in below if type(value) in _INNER]
        if not level:
            return True
    return False


def _children(value: object) -> Sequence[object]:
    if isinstance(value, tuple | list):
        return value
    if isinstance(value, Record):
        return value.args, value.state, value.items
    return (value.value,) if isinstance(value, Persistent) else ()
