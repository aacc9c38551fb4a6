"""The process that judges the tests of generated code. `sandbox.runner` starts it; the program never imports it.

Three processes. The keeper confines itself, starts the judge and reaps whatever is left. The judge reads the tests and
starts the worker before it has read them. The worker alone runs the code; it holds neither the tests, nor what they
expect, nor the pipe the verdict goes through. The judge evaluates each test itself: where it names something of the
code's, a `Remote` stands, and calling that sends the arguments to the worker and brings the result back as plain data.
So no exit, patched builtin, printed result or always-equal object in the worker can make a test pass: only values can.
"""

from __future__ import annotations

import _pickle as pickle  # as in sandbox.channel
import builtins
import os
import signal

from sandbox import jail
from sandbox.channel import LONGEST_NOTE, Channel, CodeRaised, Remote, WorkerGone, describe
from sandbox.worker import start_worker

TYPE_CHECKING = False  # typing and collections.abc cost 5 ms a run
if TYPE_CHECKING:
    from collections.abc import Iterator
    from typing import Any

__all__ = ["Channel", "CodeRaised", "Judge", "Remote", "WorkerGone", "main"]

ONLY_AST = 0x400  # ast.PyCF_ONLY_AST: compile() to a syntax tree, without importing ast
# What a test may name without importing it; the judge's own modules, whatever the code calls by these names.
MODULES = frozenset(
    {"bisect", "cmath", "collections", "copy", "datetime", "decimal", "fractions", "functools", "heapq", "itertools"}
    | {"json", "math", "operator", "random", "re", "statistics", "string", "sys"}
)


# --- judge ------------------------------------------------------------------------------------------------------------


class Judge:
    """Evaluates setup and tests with the code's names standing for what the worker holds."""

    def __init__(self, channel: Channel):
        self.channel = channel
        self.scope: dict[str, Any] = {"__name__": "tests"}

    def run(self, source: str, scope: dict[str, Any], setup: bool = False) -> None:
        """Executes `source` in `scope`, with the names it reads fetched from the worker.

        A setup's classes stay the worker's: their objects are what the code is called with.

        Raises:
            CodeRaised: the code raised where it was called.
            WorkerGone: the worker died.
            BaseException: whatever the source raises itself.
        """
        filename = "<setup>" if setup else "<test>"
        tree = compile(source, filename, "exec", ONLY_AST, dont_inherit=True)
        if setup:
            tree.body = [node for node in tree.body if type(node).__name__ != "ClassDef"]
        self._bind(tree, scope)
        exec(compile(tree, filename, "exec", dont_inherit=True), scope)

    def _bind(self, tree: Any, scope: dict[str, Any]) -> None:
        """Fetches the code's names. A builtin stays Python's own, unless a test can only mean the code's."""
        names = list(loaded_names(tree))
        foreign = [name for name in names if name not in scope and not hasattr(builtins, name)]
        for name in foreign:
            if name in MODULES:
                scope[name] = __import__(name)
            else:
                self._fetch(name, scope)
        if foreign or scope is self.scope:
            return

        # A test that names nothing but builtins tests one that the code defines itself: the first such name.
        for name in names:
            if name not in scope and self._fetch(name, scope):
                return

    def _fetch(self, name: str, scope: dict[str, Any]) -> bool:
        """Whether the code defines `name`, which then stands in `scope`. Raises WorkerGone."""
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
            kind = "memory" if error.kind == "memory" else "failed"
            return kind, str(error)
        except MemoryError:
            return "memory", "MemoryError"
        except BaseException as error:  # noqa: B036 - a test may raise anything, SystemExit too
            return "failed", describe(error)
        return "passed", ""


def loaded_names(tree: Any) -> Iterator[str]:
    """Names that `tree` reads and does not itself assign, in the order of the text, each once."""
    loaded = []
    stored = set()

    # Depth first from a stack, children in reverse, so that nodes are met in the order of the text.
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        kind = type(node).__name__
        if kind == "arg":
            stored.add(node.arg)
        elif kind == "Name" and type(node.ctx).__name__ == "Store":
            stored.add(node.id)
        elif kind == "Name":
            loaded.append(node.id)

        below = []
        for field in getattr(node, "_fields", ()):
            value = getattr(node, field, None)
            below += value if isinstance(value, list) else [value]
        waiting += reversed(below)
    return (name for name in dict.fromkeys(loaded) if name not in stored)


# --- verdict ----------------------------------------------------------------------------------------------------------


def write_record(fd: int, kind: str, note: str = "") -> None:
    """One line of the verdict: `kind note`, the note in ASCII."""
    line = f"{kind} {note[:LONGEST_NOTE]}".encode("unicode_escape") + b"\n"
    while line:
        line = line[os.write(fd, line) :]


def serve_verdict(verdict: int, confined: bool, memory_mb: int, cpu_seconds: int) -> None:
    """The judge's whole life: worker first, then the job from standard input, then one record per test.

    Args:
        verdict: descriptor that the records are written to; the runner reads the other end.
        confined: namespaces hold this process, so whatever else cannot be confined is an error.
        memory_mb: address space of the worker in MiB; the judge has twice as much.
        cpu_seconds: of each of the two processes.

    Raises:
        CannotConfine: the judge cannot be confined.
    """
    worker, channel = start_worker(confined, memory_mb, cpu_seconds)
    refused = channel.receive()
    if refused != "ready":
        write_record(verdict, "refused", str(refused))
        return

    # The job is the parent's own words, so it may be unpickled freely.
    with open(0, "rb", closefd=False) as job:
        setup, code, tests = pickle.load(job)
    jail.protect(confined, 2 * memory_mb, cpu_seconds)
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
    if code >= 0:
        return f"the code ended its process with status {code}"
    return f"the process died of signal {-code}"


# --- keeper -----------------------------------------------------------------------------------------------------------


def main(verdict: int, memory_mb: int, cpu_seconds: int, allow_unconfined: bool) -> None:
    """Confines, forks the judge, waits; SIGTERM ends everything. Never returns.

    `verdict`, `memory_mb` and `cpu_seconds` are those of `serve_verdict`; `allow_unconfined` goes on where namespaces
    are refused.
    """
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

    # The handler above is the keeper's; in the judge SIGTERM means again what it always does.
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

    # Orphans of the judge come here too, so waiting ends when none of them is left.
    children.append(pid)
    os.close(verdict)
    try:
        while True:
            if os.wait()[0] == pid:
                children.clear()
    except ChildProcessError:
        os._exit(0)
