"""What the data scripts share: both spellings of a flag, one line for a user's mistake, files that appear whole."""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import psutil

MARK = ".tmp-"


class ScriptParser(argparse.ArgumentParser):
    """An argument parser that takes `--max-seq-len` and `--max_seq_len` alike; the help shows underscores."""

    def __init__(self, description: str | None):
        super().__init__(description=description, formatter_class=argparse.RawDescriptionHelpFormatter,
                         allow_abbrev=False)

    def parse_known_args(self, args: Sequence[str] | None = None, namespace=None):
        return super().parse_known_args([_underscored(word) for word in (sys.argv[1:] if args is None else args)],
                                        namespace)


def _underscored(word: str) -> str:
    if not re.match("--[a-z]", word):
        return word
    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


def run_script(main: Callable[[], int | None]) -> int:
    """`main`'s exit status; 2 and one line on stderr per problem for a user's mistake, 130 when interrupted."""
    name = Path(sys.argv[0]).name
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        text = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.strerror else str(error)
        for line in text.splitlines() or [type(error).__name__]:
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted; nothing was left under a final name, run it again", file=sys.stderr)
        return 130


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
