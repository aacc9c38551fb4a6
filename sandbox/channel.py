"""What travels between the judge and the code it judges: plain data, and handles for everything else.

Only the processes that `sandbox.runner` starts import this; see `sandbox.judge` for who they are. The worker, which
runs the code, may send whatever it likes, so the judge's end never unpickles a class: a value arrives as plain data,
as one of `REBUILT`, or as a `Remote`.
"""

from __future__ import annotations

import _pickle as pickle  # CPython's own; the pure `pickle` around it imports re, which costs 4 ms a run
import builtins
import io
import os
import struct
from operator import attrgetter  # comes with _pickle

TYPE_CHECKING = False  # typing and collections.abc cost 5 ms a run
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LARGEST_MESSAGE = 64 << 20  # bytes
LONGEST_NOTE = 300  # characters of an error's text
LENGTH = "=Q"  # a message follows its length in bytes
LENGTH_BYTES = 8


def _deque_parts(value: Any) -> tuple[Any, ...]:
    return list(value), value.maxlen


def _decimal_parts(value: Any) -> tuple[Any, ...]:
    return (str(value),)


# Plain data travels as it is, a subclass of `BASES` as its base, and these by the arguments of their constructors.
PLAIN = (type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset)
BASES = (int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset)
REBUILT = {
    "builtins.complex": attrgetter("real", "imag"),
    "builtins.range": attrgetter("start", "stop", "step"),
    "collections.deque": _deque_parts,
    "datetime.date": attrgetter("year", "month", "day"),
    "datetime.timedelta": attrgetter("days", "seconds", "microseconds"),
    "decimal.Decimal": _decimal_parts,
    "fractions.Fraction": attrgetter("numerator", "denominator"),
}


class WorkerGone(Exception):
    """The worker died: the code left the interpreter, crashed it or ran into a limit."""


class CodeRaised(Exception):
    """The code raised; `kind` is syntax, memory or error, and nothing else that a worker may call it."""

    def __init__(self, kind: str, note: str):
        super().__init__(note[:LONGEST_NOTE])
        if kind not in ("syntax", "memory"):
            kind = "error"
        self.kind = kind


def describe(error: BaseException) -> str:
    """`Type: text` of any exception, also of one whose text raises; one line of at most `LONGEST_NOTE` characters."""
    try:
        note = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: B036 - the code's own exception classes do what they like
        note = type(error).__name__
    return " ".join(note[:LONGEST_NOTE].split())


class Channel:
    """Pickles over two pipes, each behind its length.

    `references` is the list in which the worker keeps its objects that are no plain data, each known by its place
    there; None makes this the judge's end, where a `Remote` stands for such an object.
    """

    def __init__(self, read_fd: int, write_fd: int, references: list[Any] | None = None):
        self.read_fd = read_fd
        self.write_fd = write_fd
        self.references = references
        channel = self

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return channel._describe(value)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, described: Any) -> Any:
                return channel._restore(*described)

            # The one door to a class, and it is shut.
            def find_class(self, module: str, name: str) -> Any:
                raise pickle.UnpicklingError(f"{module}.{name} may not travel")

        self._pickler = Pickler
        self._unpickler = Unpickler

    def _describe(self, value: Any) -> Any:
        """None for what pickles by itself, else what `_restore` takes."""
        # The exact type counts: a subclass may have any method replaced.
        kind = type(value)
        if kind in PLAIN:
            return None
        if kind is Remote:
            return "mine", value._judge_reference

        # A class of the code's may call itself one of these; the other end builds the real one, from plain values.
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in REBUILT:
            return name, *REBUILT[name](value)
        for base in BASES:
            if isinstance(value, base):
                return "base", base(value)
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return "builtin", value.__name__

        # Everything else stays where it is.
        if self.references is None:
            raise TypeError(f"a test cannot hand a {kind.__name__} to the code")
        self.references.append(value)
        return "yours", len(self.references) - 1

    def _restore(self, tag: str, *parts: Any) -> Any:
        """The value that the other end's `_describe` described. Raises UnpicklingError for what it cannot have sent."""
        if tag == "mine" and self.references is not None:
            return self.references[parts[0]]
        if tag == "yours" and self.references is None:
            return Remote(self, int(parts[0]))
        if tag == "base":
            return parts[0]
        if tag == "builtin" and isinstance(getattr(builtins, parts[0], None), type):
            return getattr(builtins, parts[0])
        if tag in REBUILT:
            module, _, name = tag.rpartition(".")
            return getattr(__import__(module), name)(*parts)
        raise pickle.UnpicklingError(f"unknown tag {tag!r}")

    def send(self, message: Any) -> None:
        """Writes all of a message. Raises what pickling it raises, and OSError when the other end is gone."""
        buffer = io.BytesIO()
        self._pickler(buffer, protocol=4).dump(message)

        # A pipe takes what it has room for.
        data = memoryview(struct.pack(LENGTH, buffer.tell()) + buffer.getvalue())
        while data:
            data = data[os.write(self.write_fd, data) :]

    def receive(self) -> Any:
        """The next message. Raises EOFError when the other end is gone, ValueError for too long a message."""
        (size,) = struct.unpack(LENGTH, self._read(LENGTH_BYTES))
        if size > LARGEST_MESSAGE:
            raise ValueError("the code's result is too large")

        return self._unpickler(io.BytesIO(self._read(size))).load()

    def _read(self, size: int) -> bytes:
        content = bytearray()
        while len(content) < size:
            piece = os.read(self.read_fd, min(size - len(content), 1 << 20))
            if not piece:
                raise EOFError
            content += piece
        return bytes(content)

    def ask(self, action: str, *operands: Any) -> Any:
        """What the worker answers. Raises CodeRaised, StopIteration, WorkerGone."""
        try:
            self.send((action, operands))
            answer, payload = self.receive()
        except (EOFError, BrokenPipeError) as error:
            raise WorkerGone from error

        if answer == "value":
            return payload
        if answer == "stop":
            raise StopIteration
        kind, note = payload
        raise CodeRaised(str(kind), str(note))


class Remote:
    """An object of the code's that is no plain data. It equals nothing but itself and has no order.

    Whatever a test does with it is asked of the worker. Its own two slots have names that code does not use.
    """

    __slots__ = ("_judge_channel", "_judge_reference")

    def __init__(self, channel: Channel, reference: int):
        # Past `__setattr__`, which speaks of the code's object.
        object.__setattr__(self, "_judge_channel", channel)
        object.__setattr__(self, "_judge_reference", reference)

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        return self._judge_channel.ask("call", self, arguments, named)

    def __getattr__(self, name: str) -> Any:
        return self._judge_channel.ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._judge_channel.ask("setattr", self, name, value)

    def __getitem__(self, key: Any) -> Any:
        return self._judge_channel.ask("getitem", self, key)

    def __iter__(self) -> Iterator[Any]:
        return self._judge_channel.ask("iter", self)

    def __next__(self) -> Any:
        return self._judge_channel.ask("next", self)

    def __len__(self) -> int:
        try:
            return self._judge_channel.ask("len", self)
        except CodeRaised as error:  # list() asks for a length hint, and goes on without it only after a TypeError
            raise TypeError(str(error)) from error

    def __str__(self) -> str:
        return self._judge_channel.ask("str", self)
