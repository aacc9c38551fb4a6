"""Pools and threads for code that can start neither process nor thread: their work is done at once, to its end."""

from __future__ import annotations

import itertools


class Result:
    """What the asynchronous calls of a pool return."""

    def __init__(self, value):
        self.get = lambda timeout=None: value
        self.ready = self.successful = lambda: True
        self.wait = lambda timeout=None: None


class Pool:
    """The calls of `multiprocessing.Pool`, one after another."""

    def __init__(self, processes=None, initializer=None, initargs=(), *rest, **named):
        if initializer is not None:
            initializer(*initargs)

    def apply(self, function, args=(), kwds=None):
        return function(*args, **(kwds or {}))

    def map(self, function, iterable, chunksize=None):
        return list(map(function, iterable))

    def starmap(self, function, iterable, chunksize=None):
        return list(itertools.starmap(function, iterable))

    def imap(self, function, iterable, chunksize=None):
        return map(function, iterable)

    imap_unordered = imap

    def __getattr__(self, name):
        # apply_async, map_async, starmap_async: the same, with the result behind `get`.
        call = getattr(type(self), name.removesuffix("_async"))

        def done(*args, callback=None, error_callback=None, **named):
            value = call(self, *args, **named)
            if callback is not None:
                callback(value)
            return Result(value)

        return done

    def __enter__(self):
        return self

    def close(self, *error):
        pass

    terminate = join = __exit__ = close


class Executor:
    """The calls of `concurrent.futures.ThreadPoolExecutor`, one after another."""

    def __init__(self, max_workers=None, *rest, initializer=None, initargs=(), **named):
        if initializer is not None:
            initializer(*initargs)

    def submit(self, function, /, *args, **named):
        from concurrent.futures import Future

        future = Future()
        future.set_running_or_notify_cancel()
        try:
            future.set_result(function(*args, **named))
        except BaseException as error:  # noqa: B036 - whoever asks for the result meets it
            future.set_exception(error)
        return future

    def map(self, function, *iterables, timeout=None, chunksize=1):
        return map(function, *iterables)

    def __enter__(self):
        return self

    def shutdown(self, *error, wait=True, cancel_futures=False):
        pass

    __exit__ = shutdown


def run_threads_inline() -> None:
    """Imports `threading`, and lets a thread run where it is started. One that waits for a later one waits for ever."""
    import threading

    def start(self):
        if self._started.is_set():
            raise RuntimeError("threads can only be started once")
        self._started.set()

        # While it runs it is the current thread.
        self._ident = threading.get_ident()
        starter = threading.current_thread()
        threading._active[self._ident] = self
        try:
            self.run()
        except SystemExit:
            pass
        except BaseException:  # noqa: B036 - a thread's exception ends the thread alone
            self._invoke_excepthook(self)
        finally:
            threading._active[self._ident] = starter

    def is_alive(self):
        return threading._active.get(self._ident) is self

    def join(self, timeout=None):
        if not self._started.is_set():
            raise RuntimeError("cannot join thread before it is started")

    threading.Thread.start = start
    threading.Thread.is_alive = is_alive
    threading.Thread.join = join


def leave_out_debugging() -> None:
    """Imports `asyncio` and lets no loop debug: that asks for frames, which are refused."""
    import asyncio

    def get_debug(self):
        return False

    asyncio.BaseEventLoop.get_debug = get_debug


ThreadPool = Pool
ThreadPoolExecutor = ProcessPoolExecutor = Executor
MODULES = ("multiprocessing.pool", "concurrent.futures.thread", "concurrent.futures.process")  # it stands for
