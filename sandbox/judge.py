"""The first process of a run: it confines itself, starts the worker, waits, and reaps whatever is left.

`sandbox.runner` starts it; the program itself never imports it.
"""

from __future__ import annotations

import _signal as signal  # the public `signal` around it imports enum, which costs 5 ms a run
import os

from sandbox import jail, worker


def how_it_ended(status: int) -> str:
    """A wait status in words."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        return f"the code ended its process with status {code}"
    return f"the process died of signal {-code}"


def main(verdict: int, memory_mb: int, cpu_seconds: int, allow_unconfined: bool) -> None:
    """Confines, forks the worker, waits; SIGTERM ends everything. Never returns.

    `verdict`, `memory_mb` and `cpu_seconds` are those of `sandbox.worker.serve`; `allow_unconfined` goes on where
    namespaces are refused.
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
            worker.write_record(verdict, "refused", str(error))
            os._exit(0)
    os.environ["HOME"] = os.environ["TMPDIR"] = os.getcwd()

    # The handler above is this process's; in the worker SIGTERM means again what it always does.
    pid = os.fork()
    if pid == 0:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            worker.serve(verdict, confined, memory_mb, cpu_seconds)
        except jail.CannotConfine as error:
            worker.write_record(verdict, "refused", str(error))
        finally:
            os._exit(0)

    # Orphans of the worker come here too, so waiting ends when none of them is left.
    children.append(pid)
    try:
        while True:
            done, status = os.wait()
            if done == pid:
                children.clear()
                worker.write_record(verdict, "gone", how_it_ended(status))
    except ChildProcessError:
        os._exit(0)
