"""What the scripts share: both spellings of a flag, one line for a user's mistake."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any


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


def csv_text(columns: Sequence[str], rows: Iterable[Mapping[str, Any]]) -> str:
    """A table as CSV with a heading: floats with six digits, missing values and None empty.

    Raises:
        ValueError: a row has a value that is in no column.
    """
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {}
        for name, value in row.items():
            cells[name] = f"{value:.6g}" if isinstance(value, float) else value
        writer.writerow(cells)
    return text.getvalue()
