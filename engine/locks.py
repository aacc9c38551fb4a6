"""A file as a lock between processes, which wait for one another; the lock of a dead process is gone."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from engine.ownership import HELD


@contextlib.contextmanager
def locked(path: Path, waits: Callable[[], None] | None = None) -> Iterator[BinaryIO]:
    """The file, made if missing, open for reading and appending; inside, others who want the same wait.

    Whoever has the lock may remove the file or put another in its place: who waited then takes that one's lock. A file
    system without locks keeps nobody out.

    Args:
        path: the file.
        waits: called once where another process has the lock, before it is waited for.

    Raises:
        OSError: the file cannot be opened.
    """
    with contextlib.ExitStack() as stack:
        while True:
            file = stack.enter_context(open(path, "a+b", buffering=0))
            if not _taken(file):
                if waits:
                    waits()
                    waits = None
                fcntl.flock(file, fcntl.LOCK_EX)

            # Whoever had the lock before may have put another file in its place.
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), os.stat(path)):
                    break
            stack.close()
        yield file


def _taken(file: BinaryIO) -> bool:
    """Takes the lock if nobody has it. False: another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:  # other errors: a file system without locks
        return error.errno not in HELD
    return True
