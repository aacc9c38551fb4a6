"""The process that runs generated code and judges its tests. `sandbox.runner` starts it; the program never imports it.

Three processes. The keeper confines itself, starts the judge and reaps whatever is left. The judge reads the tests and
starts the worker before it has read them. The worker alone runs the code; it holds neither the tests, nor what they
expect, nor the pipe the verdict goes through. The judge evaluates each test itself: where it names something of the
code's, a `Remote` stands, and calling that sends the arguments to the worker and brings the result back as plain data.
So no exit, patched builtin, printed result or always-equal object in the worker can make a test pass: only values can.
"""

from __future__ import annotations

import _pickle as pickle  # CPython's own; the pure `pickle` around it imports re, which costs 4 ms a run
import builtins
import io
import os
import signal
import struct
import sys
from types import ModuleType

from sandbox import jail

TYPE_CHECKING = False  # typing and collections.abc cost 5 ms a run
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

LARGEST_MESSAGE = 64 << 20  # bytes
LONGEST_NOTE = 300  # characters of an error's text
ONLY_AST = 0x400
# What a test may name without importing it; the judge's own modules, whatever the code calls by these names.
MODULES = frozenset(
    {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"}
    | {"json", "math", "operator", "random", "re", "statistics", "string", "sys"}
)
# Plain data travels as it is, subclasses as their base, these by their constructors' arguments.
PLAIN = (type(None), bool, int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset)
REBUILT = {
    "builtins.complex": lambda value: (value.real, value.imag),
    "builtins.range": lambda value: (value.start, value.stop, value.step),
    "collections.deque": lambda value: (list(value), value.maxlen),
    "datetime.date": lambda value: (value.year, value.month, value.day),
    "datetime.timedelta": lambda value: (value.days, value.seconds, value.microseconds),
    "decimal.Decimal": lambda value: (str(value),),
    "fractions.Fraction": lambda value: (value.numerator, value.denominator),
}
BASES = (int, float, str, bytes, bytearray, list, tuple, dict, set, frozenset)


class WorkerGone(Exception):
    """The worker died: the code left the interpreter, crashed it or ran into a limit."""


class CodeRaised(Exception):
    """The code raised; `kind` is syntax, memory or error, and nothing else that a worker may call it."""

    def __init__(self, kind: str, note: str):
        super().__init__(note[:LONGEST_NOTE])
        self.kind = kind if kind in ("syntax", "memory") else "error"


# --- messages ---------------------------------------------------------------------------------------------------------


class Channel:
    """Framed pickles over two pipes. Unpickling finds no global: what arrives is plain data, `REBUILT` or a `Remote`.

    `references` is the list the worker keeps its other objects in; None makes this the judge's end.
    """

    def __init__(self, read_fd: int, write_fd: int, references: list[Any] | None = None):
        self.read_fd, self.write_fd, self.references = read_fd, write_fd, references
        channel = self

        class Pickler(pickle.Pickler):
            def persistent_id(self, value: Any) -> Any:
                return channel._describe(value)

        class Unpickler(pickle.Unpickler):
            def persistent_load(self, described: Any) -> Any:
                return channel._restore(*described)

            def find_class(self, module: str, name: str) -> Any:
                raise pickle.UnpicklingError(f"{module}.{name} may not travel")

        self._pickler, self._unpickler = Pickler, Unpickler

    def _describe(self, value: Any) -> Any:
        """None for what pickles by itself, else what `_restore` takes."""
        kind = type(value)
        if kind in PLAIN:
            return None
        if kind is Remote:
            return "mine", value._judge_reference
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in REBUILT:
            return name, *REBUILT[name](value)
        for base in BASES:
            if isinstance(value, base):
                return "base", base(value)
        if isinstance(value, type) and getattr(builtins, value.__name__, None) is value:
            return "builtin", value.__name__
        if self.references is None:
            raise TypeError(f"a test cannot hand a {kind.__name__} to the code")
        self.references.append(value)
        return "yours", len(self.references) - 1

    def _restore(self, tag: str, *parts: Any) -> Any:
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
        buffer = io.BytesIO()
        self._pickler(buffer, protocol=4).dump(message)
        data = memoryview(struct.pack("=Q", buffer.tell()) + buffer.getvalue())
        while data:
            data = data[os.write(self.write_fd, data) :]

    def receive(self) -> Any:
        """The next message. Raises EOFError when the other end is gone, ValueError for too long a message."""
        (size,) = struct.unpack("=Q", self._read(8))
        if size > LARGEST_MESSAGE:
            raise ValueError("the code's result is too large")
        return self._unpickler(io.BytesIO(self._read(size))).load()

    def _read(self, size: int) -> bytes:
        found = bytearray()
        while len(found) < size:
            piece = os.read(self.read_fd, min(size - len(found), 1 << 20))
            if not piece:
                raise EOFError
            found += piece
        return bytes(found)

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
    """An object of the code's that is no plain data. It equals nothing but itself and has no order."""

    __slots__ = ("_judge_channel", "_judge_reference")

    def __init__(self, channel: Channel, reference: int):
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


# --- worker -----------------------------------------------------------------------------------------------------------


def describe(error: BaseException) -> str:
    """`Type: text` of any exception, also of one whose text raises; one line."""
    try:
        note = f"{type(error).__name__}: {error}"
    except BaseException:  # noqa: B036 - the code's own exception classes do what they like
        note = type(error).__name__
    return " ".join(note[:LONGEST_NOTE].split())


def load_code(module: ModuleType, setup: str, code: str) -> None:
    """Runs the code in `module`, after its setup where that needs nothing of the code's."""
    try:
        compiled = compile(code, "<code>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise CodeRaised("syntax", describe(error)) from error
    try:
        exec(compile(setup, "<setup>", "exec", dont_inherit=True), module.__dict__)
    except Exception:  # noqa: BLE001 - it needs the code, or is broken: the judge runs it again and tells
        pass
    exec(compiled, module.__dict__)


def work(channel: Channel) -> None:
    """Serves the judge until it hangs up."""
    module = ModuleType("solution")  # not __main__: a script's main block is no part of the tests
    sys.modules["solution"] = module
    actions = {
        "load": lambda setup, code: load_code(module, setup, code),
        "name": lambda name: module.__dict__[name],
        "call": lambda function, arguments, named: function(*arguments, **named),
        "getattr": getattr,
        "setattr": setattr,
        "getitem": lambda value, key: value[key],
        "iter": iter,
        "next": next,
        "len": len,
        "str": str,
    }
    while True:
        action, operands = channel.receive()
        try:
            reply = ("value", actions[action](*operands))
        except StopIteration as error:
            reply = ("stop", None) if action == "next" else ("raised", ("error", describe(error)))
        except BaseException as error:  # noqa: B036 - SystemExit too is only an answer
            kind = getattr(error, "kind", "error") if isinstance(error, CodeRaised) else "error"
            reply = ("raised", ("memory" if isinstance(error, MemoryError) else kind, describe(error)))
        flush()
        try:
            channel.send(reply)
        except OSError:
            return
        except BaseException as error:  # noqa: B036 - a result nested too deep, or too large to pack
            channel.send(("raised", ("memory" if isinstance(error, MemoryError) else "error", describe(error))))


def flush() -> None:
    """Hands on what the code printed; it may have replaced or closed its stream."""
    try:
        sys.stdout.flush()
    except Exception:  # noqa: BLE001
        pass


def start_worker(confined: bool, memory_mb: int, cpu_seconds: int) -> tuple[int, Channel]:
    """Forks the worker; it keeps its standard streams and the two pipes, nothing else. Returns its pid and our end."""
    down, up = os.pipe(), os.pipe()
    pid = os.fork()
    if pid:
        os.close(down[0]), os.close(up[1])
        return pid, Channel(up[0], down[1])
    try:
        keep = sorted((down[0], up[1]))
        null = os.open("/dev/null", os.O_RDONLY)
        os.dup2(null, 0)
        for low, high in zip([2, *keep], [*keep, 4096], strict=True):
            os.closerange(low + 1, high)
        channel = Channel(down[0], up[1], [])
        protect(confined, memory_mb, cpu_seconds, processes=0)
        try:
            jail.filter_system_calls()
        except jail.CannotConfine:
            if confined:
                raise
        channel.send("ready")
        work(channel)
    except (EOFError, BrokenPipeError):
        pass  # the judge is done
    except jail.CannotConfine as error:
        channel.send(str(error))
    finally:
        os._exit(0)


def protect(confined: bool, memory_mb: int, cpu_seconds: int, processes: int | None = None) -> None:
    """Privileges dropped and limits set; without confinement what of it this machine allows."""
    try:
        jail.drop_privileges(signal.SIGKILL)
    except jail.CannotConfine:
        if confined:
            raise
    jail.limit(memory_mb, cpu_seconds, processes)


# --- judge ------------------------------------------------------------------------------------------------------------


class Judge:
    """Evaluates setup and tests with the code's names standing for what the worker holds."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.scope: dict[str, Any] = {"__name__": "tests"}

    def run(self, source: str, scope: dict[str, Any], setup: bool = False) -> None:
        """Executes `source`. A setup's classes stay the worker's: their objects are what the code is called with."""
        tree = compile(source, "<setup>" if setup else "<test>", "exec", ONLY_AST, dont_inherit=True)
        if setup:
            tree.body = [node for node in tree.body if type(node).__name__ != "ClassDef"]
        self._bind(tree, scope)
        exec(compile(tree, "<setup>" if setup else "<test>", "exec", dont_inherit=True), scope)

    def _bind(self, tree: Any, scope: dict[str, Any]) -> None:
        """Fetches the code's names. A builtin stays Python's own, unless a test can only mean the code's."""
        names = list(loaded_names(tree))
        foreign = [name for name in names if name not in scope and not hasattr(builtins, name)]
        for name in foreign:
            if name in MODULES:
                scope[name] = __import__(name)
            else:
                self._fetch(name, scope)
        if not foreign and scope is not self.scope:
            own = [name for name in names if name not in scope]
            any(self._fetch(name, scope) for name in own)  # the first that the code defines is the function tested

    def _fetch(self, name: str, scope: dict[str, Any]) -> bool:
        try:
            scope[name] = self.channel.ask("name", name)
        except CodeRaised:
            return False
        return True

    def judge(self, test: str) -> tuple[str, str]:
        """(passed|failed|memory, why). Raises WorkerGone."""
        try:
            self.run(test, dict(self.scope))
        except WorkerGone:
            raise
        except CodeRaised as error:
            return ("memory" if error.kind == "memory" else "failed"), str(error)
        except MemoryError:
            return "memory", "MemoryError"
        except BaseException as error:  # noqa: B036 - a test may raise anything, SystemExit too
            return "failed", describe(error)
        return "passed", ""


def loaded_names(tree: Any) -> Iterator[str]:
    """Names that `tree` reads and does not itself assign, in the order of the text."""
    loaded, stored, waiting = [], set(), [tree]
    while waiting:
        node = waiting.pop()
        if type(node).__name__ == "Name":
            stored.add(node.id) if type(node.ctx).__name__ == "Store" else loaded.append(node.id)
        elif type(node).__name__ == "arg":
            stored.add(node.arg)
        below = []
        for field in getattr(node, "_fields", ()):
            value = getattr(node, field, None)
            below += value if isinstance(value, list) else [value]
        waiting += reversed(below)
    return (name for name in dict.fromkeys(loaded) if name not in stored)


def write_record(fd: int, kind: str, note: str = "") -> None:
    """One line of the verdict: `kind note`, the note in ASCII."""
    line = f"{kind} {note[:LONGEST_NOTE]}".encode("unicode_escape") + b"\n"
    while line:
        line = line[os.write(fd, line) :]


def serve_verdict(verdict: int, confined: bool, memory_mb: int, cpu_seconds: int) -> None:
    """The judge's whole life: worker first, then the job from standard input, then one record per test."""
    worker, channel = start_worker(confined, memory_mb, cpu_seconds)
    refused = channel.receive()
    if refused != "ready":
        write_record(verdict, "refused", str(refused))
        return
    with open(0, "rb", closefd=False) as job:
        setup, code, tests = pickle.load(job)  # the parent's own words
    protect(confined, 2 * memory_mb, cpu_seconds)
    write_record(verdict, "ready")
    judge = Judge(channel)
    try:
        channel.ask("load", setup, code)
        judge.run(setup, judge.scope, setup=True)
        write_record(verdict, "loaded")
        for place, test in enumerate(tests, 1):
            kind, note = judge.judge(test)
            write_record(verdict, kind, note and f"test {place}: {note}")
    except WorkerGone:
        write_record(verdict, "gone", how_it_ended(os.waitpid(worker, 0)[1]))
    except CodeRaised as error:
        write_record(verdict, error.kind, str(error))
    except BaseException as error:  # noqa: B036 - the setup may raise anything
        write_record(verdict, "error", f"setup: {describe(error)}")
    write_record(verdict, "end")


def how_it_ended(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    return f"the code ended its process with status {code}" if code >= 0 else f"the process died of signal {-code}"


# --- keeper -----------------------------------------------------------------------------------------------------------


def main(verdict: int, memory_mb: int, cpu_seconds: int, allow_unconfined: bool) -> None:
    """Confines, forks the judge, waits; SIGTERM ends everything. Never returns."""
    children: list[int] = []

    def end(*_: object) -> None:
        for child in children:
            try:
                os.kill(child, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it ended by itself a moment ago

    signal.signal(signal.SIGTERM, end)
    jail.adopt_orphans()
    confined = True
    try:
        jail.enter_namespaces()
    except jail.CannotConfine as error:
        confined = False
        if not allow_unconfined:
            write_record(verdict, "refused", str(error))
            os._exit(0)
    os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            serve_verdict(verdict, confined, memory_mb, cpu_seconds)
        except jail.CannotConfine as error:
            write_record(verdict, "refused", str(error))
        finally:
            os._exit(0)
    children.append(pid)
    os.close(verdict)
    try:
        while True:
            if os.wait()[0] == pid:
                children.clear()
    except ChildProcessError:
        os._exit(0)
