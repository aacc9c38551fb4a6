"""What the workers of tests/engine/test_worker_pool.py do; a worker finds it by name."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

BAD, FAULTY, KILLED = -1, -2, -3


def echo(prefix: str) -> Callable[[int], str]:
    """Answers a task with its number and a megabyte; the first task takes longest, so that it is done last."""

    def work(number: int) -> str:
        if number == BAD:
            raise ValueError("this row is bad")
        if number == FAULTY:
            raise KeyError("a fault of ours")
        if number == KILLED:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2 if number == 0 else 0)
        return f"{prefix} {number} " + "x" * (1 << 20)

    return work


def gated(gate: str) -> Callable[[int], int]:
    """Answers a task with its number; the first waits until the file `gate` is there."""

    def work(number: int) -> int:
        while number == 0 and not os.path.exists(gate):
            time.sleep(0.01)
        return number

    return work


def twice() -> Callable[[str], str]:
    """Answers a text with the text twice."""
    return lambda text: text + text


def process(folder: str) -> Callable[[int], int]:
    """Leaves a file with the name of its process, and answers each task with that."""
    Path(folder, str(os.getpid())).touch()
    return lambda number: os.getpid()
