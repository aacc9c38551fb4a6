"""The same work on many tasks in several processes: results come in the order of the tasks, memory is bounded.

    with WorkerPool(make, arguments, 4) as pool:
        for result in pool.in_order(tasks):

Every worker is a fresh interpreter, so no thread and no lock of this process is copied. It calls `make(*arguments)`
once, and the function that this returns for every task. It has a process group of its own: Ctrl-C reaches this
process alone, which then ends the workers. A worker also ends as soon as this process is gone, however that came about.
"""

from __future__ import annotations

import itertools
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Generic, TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

ROOT = Path(__file__).resolve().parent.parent
MOST_WORKERS = 256
HELD = 2  # tasks that a worker has at most: one at work, one that waits
AHEAD = 4  # tasks for each worker that may be done, or under way, while the first of them is not
BEGIN = "import sys; sys.path.insert(0, sys.argv[1]); from engine.worker_pool import serve; serve(int(sys.argv[2]))"


class WorkerError(ValueError):
    """A worker has ended before its work; one line for the user."""


def worker_count(asked: int) -> int:
    """The number of workers that `--workers` means: 0 is one for each core that this process may use."""
    return asked or len(os.sched_getaffinity(0))


def workers_problem(asked: int) -> str | None:
    """What is wrong with the value of `--workers`, or None."""
    if not 0 <= asked <= MOST_WORKERS:
        return f"--workers {asked} must be at least 0 and at most {MOST_WORKERS} (0: one for each core)"
    return None


class _Worker:
    """One worker process and the line to it."""

    def __init__(self, name: str, make: Callable[..., Any], arguments: Sequence[Any]):
        self.name = name
        self.held = 0  # tasks that it has

        here, there = socket.socketpair()
        with there:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", BEGIN, str(ROOT), str(there.fileno())], pass_fds=[there.fileno()],
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, process_group=0,
            )
        self.line = Connection(here.detach())
        self.send(sys.path)
        self.send((make, arguments))

    def send(self, message: Any) -> None:
        """Raises WorkerError: it has ended."""
        try:
            self.line.send(message)
        except OSError as error:
            raise self._death() from error

    def receive(self) -> tuple[int, Any, Exception | None]:
        """(number of the task, result, error). Raises WorkerError: it has ended."""
        try:
            answer = self.line.recv()
        except (EOFError, OSError) as error:
            raise self._death() from error
        self.held -= 1
        return answer

    def _death(self) -> WorkerError:
        try:
            status = self.process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            status = None

        how = f"ended with status {status}"
        if status is not None and status < 0:
            how = f"was ended by {signal.Signals(-status).name}"
        reason = ", perhaps because memory ran out: use fewer --workers" if status == -signal.SIGKILL else ""
        return WorkerError(f"{self.name} (process {self.process.pid}) {how}{reason or ': run it again'}")

    def end(self) -> None:
        """Ends it at once; what it was doing is lost."""
        self.line.close()
        self.process.kill()
        self.process.wait()


class WorkerPool(Generic[Task, Result]):
    """`count` workers; with one, the work is done in this process.

    Args:
        make: what a worker calls first: a function of a module, found by its name.
        arguments: its arguments, which travel to the worker.
        count: number of workers, at least 1.

    Raises:
        WorkerError: from `in_order`: a worker has ended.
    """

    def __init__(self, make: Callable[..., Callable[[Task], Result]], arguments: Sequence[Any], count: int):
        self.make = make
        self.arguments = arguments
        self.count = count
        self._workers: list[_Worker] = []
        self._given = 0  # tasks handed out

    def __enter__(self) -> WorkerPool[Task, Result]:
        try:
            for number in range(1, self.count + 1 if self.count > 1 else 0):
                self._workers.append(_Worker(f"worker {number} of {self.count}", self.make, self.arguments))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        self._end()

    def _end(self) -> None:
        while self._workers:
            self._workers.pop().end()

    def in_order(self, tasks: Iterable[Task]) -> Iterator[Result]:
        """The results, in the order of the tasks. Raises what a task raised, in its turn, and WorkerError."""
        if not self._workers:
            yield from map(self.make(*self.arguments), tasks)
            return

        first = self._given  # numbers go on, so that no answer to a call that was left early is taken for one of this
        waiting = enumerate(tasks, start=first)
        is_given_out = False
        answers: dict[int, tuple[Any, Exception | None]] = {}  # those whose turn has not come
        for turn in itertools.count(first):
            while turn not in answers:
                # Tasks for whoever has room, but not too far ahead of the result that is due.
                while not is_given_out and self._given - turn < AHEAD * self.count and self._freest().held < HELD:
                    entry = next(waiting, None)
                    if entry is None:
                        is_given_out = True
                    else:
                        self._give(entry)
                if is_given_out and turn == self._given:
                    return
                for number, result, error in self._received():
                    answers[number] = (result, error)

            result, error = answers.pop(turn)
            if error is not None:
                raise error
            yield result

    def _freest(self) -> _Worker:
        return min(self._workers, key=lambda worker: worker.held)

    def _give(self, entry: tuple[int, Task]) -> None:
        worker = self._freest()
        worker.held += 1
        self._given += 1
        worker.send(entry)

    def _received(self) -> Iterator[tuple[int, Any, Exception | None]]:
        """The answers that are there, at least one."""
        ready = wait([worker.line for worker in self._workers])
        for worker in self._workers:
            if worker.line in ready:
                yield worker.receive()


# --- in the worker ----------------------------------------------------------------------------------------------------


def serve(handle: int) -> None:
    """Does what comes over the socket `handle`; ends when its other side is closed."""
    line = Connection(handle)
    try:
        sys.path[:] = line.recv()
        make, arguments = line.recv()
    except EOFError:  # the other process ended while this one began
        os._exit(0)

    # Tasks are taken in beside the work: neither side ever waits for the other to read.
    tasks: queue.SimpleQueue[tuple[int, Any]] = queue.SimpleQueue()
    threading.Thread(target=_take_in, args=(line, tasks), daemon=True).start()
    work = make(*arguments)
    while True:
        number, task = tasks.get()
        result = None
        failure: Exception | None = None
        try:
            result = work(task)
        except OSError as error:
            failure = error
        except ValueError as error:
            failure = ValueError(str(error))
        except Exception:  # noqa: BLE001 - a fault of ours is shown where the pool is
            failure = RuntimeError(f"in a worker:\n{traceback.format_exc()}")
        try:
            line.send((number, result, failure))
        except OSError:
            os._exit(0)


def _take_in(line: Connection, tasks: queue.SimpleQueue[tuple[int, Any]]) -> None:
    """Queues the tasks; ends this process where the other one is gone."""
    while True:
        try:
            tasks.put(line.recv())
        except (EOFError, OSError):
            os._exit(0)
