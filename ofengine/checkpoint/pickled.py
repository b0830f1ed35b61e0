"""Follows a pickle of PyTorch's weights without calling anything that it names.

A machine of its own, and not Python's with some names forbidden: that one allocates whatever size a
pickle asks for. Each instruction here makes at most one value more than it takes, of the bytes that
follow it, so that what a pickle makes is in proportion to its size.
"""

from __future__ import annotations

import struct
from typing import Any, Callable, Dict, List, Tuple

import attrs

from ofengine.checkpoint.header import shown


class BadPickle(Exception):
    """What is in a file cannot be used; the message says why, as the end of a sentence."""


@attrs.frozen
class Storage:
    """A row of numbers in a file of its own."""

    kind: str
    """As "FloatStorage"."""
    key: str
    count: int


@attrs.frozen
class Tensor:
    """How a tensor lies in a storage; not checked to be within it."""

    storage: Storage
    offset: int
    shape: Tuple[int, ...]
    strides: Tuple[int, ...]


@attrs.frozen
class _Name:
    """A function or class that a pickle asks for."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


_ORDERED_DICT = _Name("collections", "OrderedDict")
_TENSOR = _Name("torch._utils", "_rebuild_tensor_v2")
_PARAMETER = _Name("torch._utils", "_rebuild_parameter")
_KINDS = (
    *("Double", "Float", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool"),
    *("ComplexFloat", "ComplexDouble"),
)
_STORAGES = {_Name("torch", f"{kind}Storage") for kind in _KINDS}
_DTYPES = (
    *("float64", "float32", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8"),
    *("bool", "complex64", "complex128"),
)
_KNOWN = {
    *(_ORDERED_DICT, _TENSOR, _PARAMETER),
    *_STORAGES,
    *(_Name("torch", name) for name in _DTYPES),
}
_MARK = object()


def unpickled(data: bytes) -> Any:
    """What the pickle ``data`` stands for: plain values, dicts, lists, tuples and :class:`Tensor`.

    Raises :class:`BadPickle` where it is damaged, or asks for what no tensor needs.
    """
    machine = _Machine(data)
    try:
        return machine.run()
    except (IndexError, struct.error, ValueError, TypeError, UnicodeDecodeError):
        raise BadPickle(f"its pickle is damaged at byte {machine.place:,}") from None


class _Machine:
    """A stack of values, a memo of those that are used again, and where in ``data`` it is."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self.place = 0
        self._stack: List[Any] = []
        self._memo: Dict[int, Any] = {}

    def run(self) -> Any:
        """Carry out one instruction after the other, up to the last."""
        while True:
            code = self._take(1)
            if code == b".":
                if len(self._stack) != 1:
                    raise ValueError
                return self._stack[0]
            carry_out = _INSTRUCTIONS.get(code)
            if carry_out is None:
                raise BadPickle(
                    f"its pickle has an instruction that no weights need, {code!r} at byte "
                    f"{self.place - 1:,}: save the weights alone, torch.save(model.state_dict(), "
                    "path)"
                )
            carry_out(self)

    # ------------------------------------------------------------------ what instructions use

    def _take(self, count: int) -> bytes:
        taken = self._data[self.place : self.place + count]
        if len(taken) != count:
            raise IndexError
        self.place += count
        return taken

    def _number(self, kind: str) -> Any:
        return struct.unpack("<" + kind, self._take(struct.calcsize(kind)))[0]

    def _line(self) -> str:
        end = self._data.index(b"\n", self.place)
        return self._take(end + 1 - self.place)[:-1].decode("utf-8")

    def _above_mark(self) -> List[Any]:
        for place in range(len(self._stack) - 1, -1, -1):
            if self._stack[place] is _MARK:
                above = self._stack[place + 1 :]
                del self._stack[place:]
                return above
        raise IndexError

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise ValueError
        return value

    # ------------------------------------------------------------------ instructions

    def _pass_by(self, count: int) -> None:
        self._take(count)

    def _text(self, kind: str) -> None:
        self._push(self._take(self._number(kind)).decode("utf-8", "surrogatepass"))

    def _bytes(self, kind: str) -> None:
        self._push(self._take(self._number(kind)))

    def _long(self) -> None:
        self._push(int.from_bytes(self._take(self._number("B")), "little", signed=True))

    def _tuple(self, count: int) -> None:
        values = [self._pop() for _ in range(count)]
        self._push(tuple(reversed(values)))

    def _remember(self, place: int) -> None:
        self._memo[place] = self._top()

    def _recall(self, place: int) -> None:
        if place not in self._memo:
            raise ValueError
        self._push(self._memo[place])

    def _top(self) -> Any:
        value = self._stack[-1]
        if value is _MARK:
            raise ValueError
        return value

    def _append(self, values: List[Any]) -> None:
        onto = self._top()
        if type(onto) is not list:
            raise TypeError
        onto.extend(values)

    def _set(self, values: List[Any]) -> None:
        into = self._top()
        if type(into) is not dict or len(values) % 2:
            raise TypeError
        for key, value in zip(values[::2], values[1::2]):
            # Of other keys somebody can make many that a dict takes for hours to tell apart.
            if type(key) is not str and not (_is_size(key) and key < 1 << 31):
                raise BadPickle(f"a key in it is a {type(key).__name__}, and should be a text")
            into[key] = value

    def _set_one(self) -> None:
        value = self._pop()
        self._set([self._pop(), value])

    def _append_one(self) -> None:
        self._append([self._pop()])

    def _ask_for(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise TypeError
        asked = _Name(module, name)
        if asked not in _KNOWN:
            raise BadPickle(
                f"it asks for {shown(str(asked))}, which no weights need and which could run any "
                "code: save the weights alone, torch.save(model.state_dict(), path)"
            )
        self._push(asked)

    def _ask_by_lines(self) -> None:
        module = self._line()
        self._ask_for(module, self._line())

    def _ask_by_stack(self) -> None:
        name = self._pop()
        self._ask_for(self._pop(), name)

    def _make(self) -> None:
        arguments, what = self._pop(), self._pop()
        if not isinstance(what, _Name) or not isinstance(arguments, tuple):
            raise TypeError
        if what == _ORDERED_DICT and not arguments:
            self._push({})
        elif what == _TENSOR:
            self._push(_tensor(*arguments[:4]))
        elif what == _PARAMETER and arguments and isinstance(arguments[0], Tensor):
            self._push(arguments[0])
        else:
            raise TypeError

    def _storage(self) -> None:
        given = self._pop()
        if not isinstance(given, tuple) or len(given) != 5 or given[0] != "storage":
            raise TypeError
        _, kind, key, _, count = given
        if kind not in _STORAGES or not isinstance(key, str) or not _is_size(count):
            raise TypeError
        self._push(Storage(kind.name, key, count))

    def _build(self) -> None:
        """The attributes of an object, such as ``_metadata`` of a state_dict: not needed."""
        self._pop()
        if type(self._top()) is not dict:
            raise TypeError


def _tensor(storage: Any, offset: Any, shape: Any, strides: Any) -> Tensor:
    sizes = [shape, strides]
    if not isinstance(storage, Storage) or not all(isinstance(each, tuple) for each in sizes):
        raise TypeError
    if not all(map(_is_size, (offset, *shape, *strides))):
        raise TypeError
    return Tensor(storage, offset, shape, strides)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


_INSTRUCTIONS: Dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": lambda m: m._pass_by(1),  # the protocol
    b"\x95": lambda m: m._pass_by(8),  # how long a part is
    b"(": lambda m: m._stack.append(_MARK),
    b"N": lambda m: m._push(None),
    b"\x88": lambda m: m._push(True),
    b"\x89": lambda m: m._push(False),
    b"K": lambda m: m._push(m._number("B")),
    b"M": lambda m: m._push(m._number("H")),
    b"J": lambda m: m._push(m._number("i")),
    b"\x8a": _Machine._long,
    b"G": lambda m: m._push(struct.unpack(">d", m._take(8))[0]),
    b"\x8c": lambda m: m._text("B"),
    b"X": lambda m: m._text("I"),
    b"\x8d": lambda m: m._text("Q"),
    b"U": lambda m: m._text("B"),
    b"T": lambda m: m._text("I"),
    b"C": lambda m: m._bytes("B"),
    b"B": lambda m: m._bytes("I"),
    b"]": lambda m: m._push([]),
    b"a": _Machine._append_one,
    b"e": lambda m: m._append(m._above_mark()),
    b"}": lambda m: m._push({}),
    b"s": _Machine._set_one,
    b"u": lambda m: m._set(m._above_mark()),
    b")": lambda m: m._push(()),
    b"\x85": lambda m: m._tuple(1),
    b"\x86": lambda m: m._tuple(2),
    b"\x87": lambda m: m._tuple(3),
    b"t": lambda m: m._push(tuple(m._above_mark())),
    b"q": lambda m: m._remember(m._number("B")),
    b"r": lambda m: m._remember(m._number("I")),
    b"\x94": lambda m: m._remember(len(m._memo)),
    b"h": lambda m: m._recall(m._number("B")),
    b"j": lambda m: m._recall(m._number("I")),
    b"c": _Machine._ask_by_lines,
    b"\x93": _Machine._ask_by_stack,
    b"R": _Machine._make,
    b"Q": _Machine._storage,
    b"b": _Machine._build,
}
"""By their first byte. What is not here, no weights need."""
