"""A limit of wall-clock time on a call of foreign code that may take minutes, such as a scorer or a generator of items.

In the main thread a timer signal (SIGALRM) ends the call; in any other thread an exception that a watchdog sends to it.
Both act between two steps of Python code. A single step that takes long by itself, such as `sum(range(10**12))`, is
ended when it is done.
"""

from __future__ import annotations

import ctypes
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

T = TypeVar("T")
AGAIN_S = 0.05  # seconds between two tries to end a call: `except:` may swallow one, and so may a destructor


class TimeLimitError(Exception):
    """A call was ended at its limit of time."""


class _Interrupt(BaseException):
    """Ends the call from within; no Exception, so that the `except Exception` of foreign code does not hold it up."""


def call_within(seconds: float, function: Callable[..., T], *arguments: Any) -> T:
    """`function(*arguments)`, ended after `seconds` of wall-clock time; 0 = no limit. Calls may be nested.

    A call that swallows the interruption and returns, or raises something else, counts as ended all the same.

    Raises:
        TimeLimitError: the time ran out.
    """
    if not seconds:
        return function(*arguments)
    in_main = threading.current_thread() is threading.main_thread()
    if in_main and 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= seconds:
        return _run(function, arguments)  # an outer call ends sooner, and both with it
    guard = _Timer(seconds) if in_main else _Watchdog(seconds)

    # The watchdog may interrupt as late as on the way out, hence the second `close`.
    try:
        try:
            return _run(function, arguments)
        finally:
            guard.close()
            if guard.fired:
                raise _Interrupt
    except _Interrupt:
        guard.close()
        if not guard.fired:  # it belongs to an outer call
            raise
    _forget_half_done()
    raise TimeLimitError(f"ended after {seconds:g} s")


def _run(function: Callable[..., T], arguments: Sequence[Any]) -> T:
    """The call itself: the only frame of this module that a timer may interrupt."""
    return function(*arguments)


class _Timer:
    """Interrupts the main thread by SIGALRM; `close` brings back what the signal and its timer were before."""

    def __init__(self, seconds: float):
        self.fired = False
        self._open = True
        self._began = time.monotonic()

        self._handler = signal.signal(signal.SIGALRM, self._interrupt)
        self._left, self._again = signal.setitimer(signal.ITIMER_REAL, seconds, AGAIN_S)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if not self._open:
            return
        self.fired = True

        # Not while this module takes a guard down: that would leave a timer running.
        ours = frame is not None and frame.f_globals is globals() and frame.f_code is not _run.__code__
        if not ours:
            raise _Interrupt

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, self._handler)

        # The timer of an outer call has gone on meanwhile; one that has run out fires at once.
        if self._left:
            left = self._left - (time.monotonic() - self._began)
            signal.setitimer(signal.ITIMER_REAL, max(left, 1e-6), self._again)


class _Watchdog:
    """Interrupts the thread that makes it, which is not the main one, by an exception sent from another thread."""

    def __init__(self, seconds: float):
        self.fired = False
        self._open = True
        self._seconds = seconds
        self._thread = ctypes.c_ulong(threading.get_ident())
        self._lock = threading.Lock()
        self._closed = threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        wait_s = self._seconds
        while not self._closed.wait(wait_s):
            wait_s = AGAIN_S
            with self._lock:
                if self._open:
                    self.fired = True
                    self._send(ctypes.py_object(_Interrupt))

    def _send(self, exception: Any) -> None:
        """The exception arrives at the thread's next step; None takes back one that has not arrived."""
        ctypes.pythonapi.PyThreadState_SetAsyncExc(self._thread, exception)

    def close(self) -> None:
        if not self._open:
            return
        with self._lock:
            self._open = False
            self._send(None)
        self._closed.set()


def _forget_half_done() -> None:
    """Drops sympy's cache: a call that ended midway leaves objects in it that know less than they should."""
    cache = sys.modules.get("sympy.core.cache")
    if cache is not None:
        cache.clear_cache()
