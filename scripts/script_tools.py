"""What the scripts share: both spellings of a flag, one line for a user's mistake."""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import re
import signal
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn


class ScriptParser(argparse.ArgumentParser):
    """An argument parser that takes `--max-seq-len` and `--max_seq_len` alike; the help shows underscores.

    A mistake is one line.
    """

    def __init__(self, description: str | None):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
        )

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None):
        """As argparse's; `parse_args` calls it."""
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in words], namespace)

    def error(self, message: str) -> NoReturn:
        """Ends the process with status 2 and the mistake in one line, without the usage text."""
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def add_spread_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `SpreadConfig`, for scripts that load an add-on's LLM."""
    parser.add_argument("--device_map", default="none", choices=("none", "auto"),
                        help="auto spreads the LLM over all accelerators, then memory, then the disk")
    parser.add_argument("--max_memory", metavar="JSON", help="with --device_map auto: the most that each place holds, "
                        'such as {"0": "10GiB", "cpu": "30GiB"}')


def spread_of(args: argparse.Namespace) -> Any:
    """The `SpreadConfig` of those flags."""
    from engine.placement import SpreadConfig

    return SpreadConfig(args.device_map, args.max_memory)


def _underscored(word: str) -> str:
    """A flag with underscores for hyphens; its value, and a word that is no flag, stay as they are."""
    if not re.match("--[a-z]", word):
        return word

    flag, equals, value = word.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a script as Ctrl-C does: what it was writing goes."""


def run_script(main: Callable[[], int | None]) -> int:
    """Runs a script's `main`; returns the exit status.

    A user's mistake (ValueError, OSError) prints one line to stderr for each problem and gives 2; Ctrl-C gives 130,
    SIGTERM 143.
    """
    name = Path(sys.argv[0]).name

    def stop(number: int, frame: Any) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, stop)
    try:
        return main() or 0
    except (ValueError, OSError) as error:
        # The system's errors print as "[Errno 2] ...: 'path'"; the file and the words are enough.
        text = str(error)
        if isinstance(error, OSError) and error.strerror:
            text = f"{error.filename}: {error.strerror}"

        for line in text.splitlines() or [type(error).__name__]:
            print(f"{name}: error: {line}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        print(f"{name}: interrupted; nothing was left under a final name, run it again", file=sys.stderr)
        return 143 if isinstance(error, Terminated) else 130
    finally:
        signal.signal(signal.SIGTERM, before)


def file_sha256(path: Path) -> str:
    """The SHA-256 of a file, in hex digits."""
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
