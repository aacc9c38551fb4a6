"""The process that runs generated code. It holds neither the tests, nor what they expect, nor the verdict's pipe.

`sandbox.judge` forks it before reading the job; all that it knows of a test is what it is asked over its `Channel`.
"""

from __future__ import annotations

import operator
import os
import sys
from types import ModuleType

from sandbox import jail
from sandbox.channel import Channel, CodeRaised, describe

TYPE_CHECKING = False  # typing costs 5 ms a run
if TYPE_CHECKING:
    from typing import Any

HIGHEST_FD = 4096  # no descriptor lies beyond


def load_code(module: ModuleType, setup: str, code: str) -> None:
    """Runs the code in `module`, after its setup where that needs nothing of the code's.

    Raises:
        CodeRaised: of kind `syntax`, where the code does not compile.
        BaseException: whatever the code raises while it loads.
    """
    try:
        compiled = compile(code, "<code>", "exec", dont_inherit=True)
    except (SyntaxError, ValueError, OverflowError, RecursionError, MemoryError) as error:
        raise CodeRaised("syntax", describe(error)) from error

    try:
        exec(compile(setup, "<setup>", "exec", dont_inherit=True), module.__dict__)
    except Exception:  # noqa: BLE001 - it needs the code, or is broken: the judge runs it again and tells
        pass
    exec(compiled, module.__dict__)


def _call(function: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> Any:
    return function(*arguments, **named)


def work(channel: Channel) -> None:
    """Serves the judge until it hangs up. Raises EOFError then."""
    module = ModuleType("solution")  # not __main__: a script's main block is no part of the tests
    sys.modules["solution"] = module

    def load(setup: str, code: str) -> None:
        load_code(module, setup, code)

    def by_name(name: str) -> Any:
        return module.__dict__[name]

    # Bound before the code runs, which may replace the builtins.
    actions = {
        "load": load,
        "name": by_name,
        "call": _call,
        "getattr": getattr,
        "setattr": setattr,
        "getitem": operator.getitem,
        "iter": iter,
        "next": next,
        "len": len,
        "str": str,
    }
    while True:
        action, operands = channel.receive()
        reply = _reply(actions, action, operands)
        flush()
        try:
            channel.send(reply)
        except OSError:
            return
        except BaseException as error:  # noqa: B036 - a result nested too deep, or too large to pack
            channel.send(_raised(error))


def _reply(actions: dict[str, Any], action: str, operands: tuple[Any, ...]) -> tuple[str, Any]:
    """(value | stop | raised, payload) of one action. Nothing that the code raises leaves this function."""
    try:
        return "value", actions[action](*operands)
    except StopIteration as error:
        if action == "next":
            return "stop", None
        return "raised", ("error", describe(error))
    except BaseException as error:  # noqa: B036 - SystemExit too is only an answer
        kind = "error"
        if isinstance(error, CodeRaised):
            kind = getattr(error, "kind", "error")
        return _raised(error, kind)


def _raised(error: BaseException, kind: str = "error") -> tuple[str, tuple[str, str]]:
    """The reply that tells of an exception."""
    if isinstance(error, MemoryError):
        kind = "memory"
    return "raised", (kind, describe(error))


def flush() -> None:
    """Hands on what the code printed; it may have replaced or closed its stream."""
    try:
        sys.stdout.flush()
    except Exception:  # noqa: BLE001
        pass


def start_worker(confined: bool, memory_mb: int, cpu_seconds: int) -> tuple[int, Channel]:
    """Forks the worker. Returns its process id and the judge's end of the channel.

    The worker keeps its standard streams and the two pipes, nothing else. Its first message is "ready", or the reason
    why it cannot be confined.
    """
    down_read, down_write = os.pipe()
    up_read, up_write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(down_read)
        os.close(up_write)
        return pid, Channel(up_read, down_write)

    # From here on this is the worker; it never returns.
    try:
        _close_all_but(down_read, up_write)
        channel = Channel(down_read, up_write, [])

        jail.protect(confined, memory_mb, cpu_seconds, processes=0)
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


def _close_all_but(*kept: int) -> None:
    """Closes every descriptor above 2 but these; standard input becomes /dev/null."""
    null = os.open("/dev/null", os.O_RDONLY)
    os.dup2(null, 0)
    low = 2
    for high in (*sorted(kept), HIGHEST_FD):
        os.closerange(low + 1, high)
        low = high
