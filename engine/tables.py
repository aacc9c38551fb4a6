"""Tables and lists of records that several processes append to: whole lines only, each run's rows its own.

Every change is made under a lock on the file, which a crash releases. Appending is one write; what must go is left out
of a copy that takes the file's name.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from engine.files import staged
from engine.locks import locked
from engine.records import plain

# What a row says of an evaluation, and what it may say; the file has one column more, the run that the row is of.
EVAL_HEADER = ("step", "task", "metric", "value", "n", "ci_low", "ci_high", "bare", "segments_used", "elapsed_s")
RUN = "run"
OPTIONAL = ("chance",)
COLUMNS = (*EVAL_HEADER, *OPTIONAL)
CSV_HEADER = (*COLUMNS, RUN)
NEEDED = {"step", "task", "metric", "value"}  # columns that a table of ours has had from the first version on
MOST_SHOWN = 120  # characters of a foreign header in the error


# --- lines ------------------------------------------------------------------------------------------------------------


def csv_line(values: Iterable[Any]) -> str:
    """One line of a table: numbers with six digits, None as an empty cell."""
    return _joined([_cell(value) for value in values])


def _cell(value: Any) -> str:
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split())  # a line break inside a cell would make half a row look whole


def _joined(cells: Sequence[str]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _cells(line: str) -> list[str]:
    """The cells of one line; none where it is damaged beyond reading."""
    try:
        return next(csv.reader([line.rstrip("\r\n")]), [])
    except csv.Error:
        return []


def _number(text: str) -> float:
    """A step; infinity if it is damaged, so that rewinding drops it."""
    try:
        return float(text)
    except ValueError:
        return math.inf


def _step_of_record(line: str) -> float:
    """The step of a JSON line; infinity if it is damaged."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError, RecursionError, OverflowError):
        return math.inf


# --- the file ---------------------------------------------------------------------------------------------------------


def _whole_lines(file: BinaryIO) -> list[str]:
    """The lines of an open file that have their line break. Only a newline ends one: answers may hold U+2028."""
    file.seek(0)
    text = file.read().decode("utf-8", "replace")
    return [line + "\n" for line in text.split("\n")[:-1]]


def _cut_torn_line(file: BinaryIO) -> None:
    """Removes a last line without its line break: a crash wrote only its beginning."""
    end = file.seek(0, os.SEEK_END)
    if end == 0:
        return
    file.seek(end - 1)
    if file.read(1) != b"\n":
        file.seek(0)
        file.truncate(file.read().rfind(b"\n") + 1)


def _replace(path: Path, file: BinaryIO, lines: Sequence[str]) -> None:
    """Puts `lines` in the place of the locked file. A link stays a link, and the file's permissions stay. OSError."""
    target = Path(os.path.realpath(path))
    with staged(target.parent, [target.name]) as (rewritten,):
        os.fchmod(rewritten.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode))
        rewritten.writelines(line.encode() for line in lines)


def append(path: Path, text: str, sync: bool = True, header: str = "") -> None:
    """Appends whole lines in one write; a file without any line gets `header` first.

    Raises:
        ValueError: the disk refuses; the file is as it was.
    """
    try:
        with locked(path) as file:
            _cut_torn_line(file)
            start = file.seek(0, os.SEEK_END)
            if start == 0:
                text = header + text

            # Unbuffered, in one write: buffers would hand the kernel a row in pieces.
            content = text.encode("utf-8", "backslashreplace")  # a model may emit half a surrogate pair
            try:
                if file.write(content) != len(content):
                    raise OSError(None, "only a part could be written, the disk is full")
                if sync:
                    os.fsync(file.fileno())
            except OSError:
                file.truncate(start)
                raise
    except OSError as error:
        raise ValueError(f"cannot write {path}: {error.strerror or error}; free space or move the run") from error


def _rewrite(path: Path, change: Callable[[list[str]], list[str]]) -> None:
    """Puts what `change` makes of the whole lines in their place. Raises ValueError."""
    try:
        with locked(path) as file:
            lines = _whole_lines(file)
            changed = change(lines)
            if changed != lines:
                _replace(path, file, changed)
    except OSError as error:
        raise ValueError(f"cannot rewrite {path}: {error.strerror}; free some space and resume again") from error


# --- records of one run -----------------------------------------------------------------------------------------------


def rewind_records(path: Path, step: int) -> None:
    """Drops the JSON lines of steps behind `step`, and damaged ones. Raises ValueError."""
    if path.exists():
        _rewrite(path, lambda lines: [line for line in lines if _step_of_record(line) <= step])


# --- a table of several runs ------------------------------------------------------------------------------------------


def check_csv(path: Path) -> None:
    """Raises ValueError if `path` is a table of another kind, or cannot be one. Writes nothing."""
    if path.is_dir():
        raise ValueError(f"--log_csv {path} is a folder; give the path of a file, such as {path / 'eval.csv'}")
    if not path.exists():
        return
    with open(path, "rb") as file:
        first = file.readline(4096)

    # A crash in the middle of writing our own header leaves its beginning: that file is ours.
    ours = ",".join(CSV_HEADER)
    header = first.decode("utf-8-sig", "replace").rstrip("\r\n")
    is_torn = not first.endswith(b"\n") and ours.startswith(header)
    columns = _cells(header)
    is_older = NEEDED <= set(columns) <= set(CSV_HEADER) and len(set(columns)) == len(columns)
    if not is_older and not is_torn:
        shown = header if len(header) <= MOST_SHOWN else header[: MOST_SHOWN - 3] + "..."
        raise ValueError(f"{path} has the header {shown!r}, expected {ours!r}; give another --log_csv")


def open_table(path: Path, run: str, own: bool, before: str | None = None) -> None:
    """Makes the table, or brings an older one's columns up to date.

    Args:
        path: the table.
        run: the id of the run that writes to it.
        own: it lies in the run's folder, so that rows without a run are its own.
        before: the id that the run's rows bear so far, where that has changed.

    Raises:
        OSError, ValueError: it cannot be written.
    """

    def renewed(lines: list[str]) -> list[str]:
        if not lines:
            return [_joined(CSV_HEADER)]
        columns = _cells(lines[0].removeprefix("\ufeff"))

        changed = [_joined(CSV_HEADER)]
        for line in lines[1:]:
            if not line.strip():
                continue
            row = dict(zip(columns, _cells(line), strict=False))
            if own and row.get(RUN, "") in ("", before):
                row[RUN] = run
            changed.append(_joined([row.get(column, "") for column in CSV_HEADER]))
        return changed

    with locked(path) as file:
        _cut_torn_line(file)
    _rewrite(path, renewed)


def append_rows(path: Path, run: str, rows: Sequence[dict[str, Any]]) -> None:
    """Appends rows of a run in one write; missing values are empty. Raises ValueError."""
    lines = []
    for row in rows:
        assert set(row) <= set(COLUMNS), f"no such column: {sorted(set(row) - set(COLUMNS))}"
        assert "step" in row, "rewinding needs the step of every row"
        lines.append(csv_line([*(row.get(column) for column in COLUMNS), run]))
    append(path, "".join(lines), header=_joined(CSV_HEADER))


def rewind_rows(path: Path, run: str, step: int) -> None:
    """Drops a run's rows of steps behind `step`; rows of others stay. Raises ValueError."""

    def kept(lines: list[str]) -> list[str]:
        return lines[:1] + [line for line in lines[1:] if not is_later(_cells(line))]

    def is_later(cells: list[str]) -> bool:
        row = dict(zip(CSV_HEADER, cells, strict=False))
        return row.get(RUN) == run and _number(row["step"]) > step

    if path.exists():
        _rewrite(path, kept)
