"""engine/time_limit.py: a call ends at its limit, whatever it catches and wherever it runs, and disturbs no other."""

from __future__ import annotations

import contextlib
import signal
import threading
import time

import pytest

from engine.time_limit import TimeLimitError, call_within
from patience import HANG_S

SHORT_S = 0.02


def spin():
    while True:
        pass


def swallow_and_return():
    try:
        spin()
    except:  # noqa: E722 - as foreign scorers do
        return 1.0


def swallow_again_and_again():
    for _ in range(3):
        with contextlib.suppress(BaseException):
            spin()
    return 1.0


def raise_another():
    try:
        spin()
    except BaseException as error:
        raise ValueError("wrapped") from error


def in_a_thread(function):
    """The result of `function`, called in another thread than the main one."""
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join(HANG_S)
    return results[0]


def ended(function) -> bool:
    """Whether the call of an endless function is ended."""
    try:
        call_within(SHORT_S, function)
    except TimeLimitError:
        return True
    return False


@pytest.mark.parametrize("slow", [spin, swallow_and_return, swallow_again_and_again, raise_another])
def test_a_call_ends_at_its_limit_whatever_it_catches(slow):
    assert ended(slow)
    assert in_a_thread(lambda: ended(slow))


def test_a_call_that_waits_ends_too():
    assert ended(lambda: time.sleep(HANG_S))


def test_a_call_in_time_returns_or_raises_as_it_would():
    for run in (lambda function: function(), in_a_thread):
        assert run(lambda: call_within(HANG_S, int, "7")) == 7
        assert call_within(0, int, "7") == 7
    with pytest.raises(ValueError, match="invalid literal"):
        call_within(HANG_S, int, "x")
    with pytest.raises(SystemExit):
        call_within(HANG_S, exit)


def test_signal_and_timer_of_before_come_back():
    rung = []
    before = signal.signal(signal.SIGALRM, lambda *_: rung.append(1))
    signal.setitimer(signal.ITIMER_REAL, HANG_S)
    try:
        assert ended(spin)
        assert 0 < signal.getitimer(signal.ITIMER_REAL)[0] <= HANG_S
        signal.raise_signal(signal.SIGALRM)
        assert rung == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert ended(spin) and signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_calls_nest():
    def inner(seconds):
        try:
            call_within(seconds, spin)
        except TimeLimitError:
            return "inner"

    def outer_ends(inner_s):
        try:
            return call_within(SHORT_S if inner_s > SHORT_S else HANG_S, inner, inner_s)
        except TimeLimitError:
            return "outer"

    for run in (lambda function: function(), in_a_thread):
        assert run(lambda: outer_ends(SHORT_S)) == "inner"
        assert run(lambda: outer_ends(HANG_S)) == "outer"


def test_sympy_forgets_what_a_call_left_half_done():
    sympy = pytest.importorskip("sympy")
    x = sympy.Symbol("x")

    def half():
        sympy.sin(x) + sympy.cos(x)
        spin()

    assert ended(half)
    from sympy.core.cache import CACHE

    assert all(cached.cache_info().currsize == 0 for cached in CACHE if cached.__name__ == "__add__")
