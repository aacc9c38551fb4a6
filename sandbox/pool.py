"""Stands for the modules of pools of processes and threads, of which the code can start none: work is done at once."""

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


ThreadPool = Pool
ThreadPoolExecutor = ProcessPoolExecutor = Executor
MODULES = ("multiprocessing.pool", "concurrent.futures.thread", "concurrent.futures.process")  # it stands for
