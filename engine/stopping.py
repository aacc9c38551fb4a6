"""An orderly end by Ctrl-C or SIGTERM: between two batches, and amid what takes longer than a batch."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
from typing import Any, TypeVar

Item = TypeVar("Item")


class StopRequested(Exception):
    """Long work was left because a signal asked for an orderly end."""


class Stop:
    """Which signal asked for an orderly end, if any, and whether the work at hand may be left for it."""

    signal: int | None = None
    leaves: bool = False


_stops: list[Stop] = []  # those of the `interruptible` blocks that are open, the innermost last


@contextlib.contextmanager
def interruptible() -> Iterator[Stop]:
    """Inside, Ctrl-C and SIGTERM ask the loop to end after its step; a second one ends at once."""
    stop = Stop()
    # What the signals did before comes back at the first of them, and at the end.
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        stop.signal = number
        for each, handler in before.items():
            signal.signal(each, handler)
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    for number in before:
        signal.signal(number, ask)
    _stops.append(stop)

    # Also a run that ends by an error leaves the signals as they were.
    try:
        yield stop
    finally:
        _stops.remove(stop)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def leavable(alone: bool) -> Iterator[None]:
    """Inside, a signal that `interruptible` has seen ends the work at the next `stop_point`.

    Not unless the process is `alone`: others would wait for its part.
    """
    stop = _stops[-1] if _stops and alone else Stop()
    stop.leaves = True
    try:
        yield
    finally:
        stop.leaves = False


def stop_point() -> None:
    """Raises StopRequested amid work that may be left, where an orderly end was asked for."""
    if _stops and _stops[-1].leaves and _stops[-1].signal is not None:
        raise StopRequested


def drawn(stream: Iterator[Item], n: int) -> list[Item]:
    """The next `n` items of a stream, whose making may take long. Raises StopRequested, as `stop_point`."""
    items = []
    for _ in range(n):
        stop_point()
        items.append(next(stream))
    return items
