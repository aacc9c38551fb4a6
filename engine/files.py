"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

MARK = ".tmp-"


def _tidy(folder: Path, names: Sequence[str]) -> None:
    """Removes what killed runs left beside `names`; a run that is still alive keeps its files."""
    for left in folder.glob(MARK + "*"):
        name, _, process = left.name[len(MARK):].rpartition("-")
        if name in names and process.isdigit() and not psutil.pid_exists(int(process)):
            left.unlink(missing_ok=True)


@contextlib.contextmanager
def staged(folder: Path, names: Sequence[str]) -> Iterator[list[BinaryIO]]:
    """Files to write for `names` in `folder`, in that order; they get their names together, once all are on disk.

    The last name is the seal, the one readers ask for first: its old version goes before any file is replaced, its new
    one comes last, so that a crash in between leaves a folder without it, never a mix that looks whole. Nothing stays
    when the block raises; what a killed run left is removed by the next.

    Raises:
        OSError: the folder cannot be written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _tidy(folder, names)
    temporary = [folder / f"{MARK}{name}-{os.getpid()}" for name in names]
    try:
        with contextlib.ExitStack() as stack:
            files = [stack.enter_context(open(path, "wb", buffering=1 << 20)) for path in temporary]
            yield files
            for file in files:
                file.flush()
                os.fsync(file.fileno())
        if len(names) > 1:
            (folder / names[-1]).unlink(missing_ok=True)
        for path, name in zip(temporary, names, strict=True):
            os.replace(path, folder / name)
        handle = os.open(folder, os.O_RDONLY)
        with contextlib.suppress(OSError):  # some network file systems cannot sync a folder
            os.fsync(handle)
        os.close(handle)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
