"""What a run leaves behind beside its checkpoints: eval.csv, metrics.jsonl and predictions.jsonl.

Rows appear whole or not at all, and a resumed run holds each step once.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from engine.files import staged
from engine.records import plain
from engine.trackers import check_trackers, start_tracker

OPTIONAL = ("chance",)  # what a row may have beside these
EVAL_HEADER = ("step", "task", "metric", "value", "n", "ci_low", "ci_high", "bare", "segments_used", "elapsed_s")
MOST_SHOWN = 120  # characters of a foreign header in the error


# --- lines ------------------------------------------------------------------------------------------------------------


def _cell(value: Any) -> str:
    """A value as a CSV cell: six digits, empty for None."""
    value = plain(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(int(value))
    if isinstance(value, float):
        return f"{value:.6g}"
    return " ".join(str(value).split())  # a line break inside a cell would make half a row look whole


def _csv_line(values: Iterable[Any]) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerow([_cell(value) for value in values])
    return text.getvalue()


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"


def _append(path: Path, text: str, sync: bool) -> None:
    """Appends `text` in one write; if the disk refuses, the file is cut back to what it was. Raises ValueError."""
    content = text.encode("utf-8", "backslashreplace")  # a model may emit half a surrogate pair

    # Unbuffered, in one write: buffers would hand the kernel a row in pieces.
    try:
        with open(path, "ab", buffering=0) as file:
            start = file.seek(0, os.SEEK_END)
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


def _cut_torn_line(path: Path) -> None:
    """Removes a last line without its line break: a crash wrote only its beginning."""
    content = path.read_bytes() if path.exists() else b""
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)


def _rewind(path: Path, step: int, header: int = 0) -> None:
    """Rewrites `path` aside without the lines of later steps; the first `header` lines stay. Raises ValueError."""
    if not path.exists():
        return

    # Only a newline ends a line: answers may hold U+2028 and its like.
    with open(path, encoding="utf-8", errors="replace", newline="\n") as file:
        lines = list(file)
    kept = lines[:header] + [line for line in lines[header:] if _step(line) <= step]
    if kept == lines:
        return

    try:
        with staged(path.parent, [path.name]) as (rewritten,):
            rewritten.writelines(line.encode() for line in kept)
    except OSError as error:
        raise ValueError(f"cannot rewrite {path}: {error.strerror}; free some space and resume again") from error


def _step(line: str) -> float:
    """The step of a CSV or JSON line; infinity if it is damaged, so that rewinding drops it."""
    try:
        if line.startswith("{"):
            return float(json.loads(line)["step"])
        return float(line.split(",", 1)[0])
    except (ValueError, KeyError, TypeError):
        return math.inf


def check_csv(path: Path) -> None:
    """Raises ValueError if `path` is a CSV with another header, or cannot be one. Writes nothing."""
    if path.is_dir():
        raise ValueError(f"--log_csv {path} is a folder; give the path of a file, such as {path / 'eval.csv'}")
    if not path.exists():
        return
    with open(path, "rb") as file:
        first = file.readline(4096)

    # A crash in the middle of writing our own header leaves its beginning: that file is ours.
    ours = ",".join(EVAL_HEADER)
    header = first.decode("utf-8-sig", "replace").rstrip("\r\n")
    is_torn = not first.endswith(b"\n") and ours.startswith(header)
    if header != ours and not is_torn:
        shown = header if len(header) <= MOST_SHOWN else header[: MOST_SHOWN - 3] + "..."
        raise ValueError(f"{path} has the header {shown!r}, expected {ours!r}; give another --log_csv")


# --- a run's records --------------------------------------------------------------------------------------------------


class RunLog:
    """The records of one run.

    Everything that can be wrong is checked before anything is written. Trackers start at the first log.

    Args:
        folder: the run's folder.
        csv_path: the evaluation table; None = `<folder>/eval.csv`.
        trackers: names among `engine.trackers.TRACKERS`.
        config: every flag, for the trackers.
        main: False on other ranks, where every method does nothing.
        elapsed_offset: seconds of the run before a resume.

    Raises:
        ValueError: a CSV with another header, an unknown or missing tracker, a folder that cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        csv_path: Path | None,
        trackers: Sequence[str],
        config: dict[str, Any],
        main: bool = True,
        elapsed_offset: float = 0.0,
    ) -> None:
        self.folder = Path(folder)
        self.csv_path = Path(csv_path) if csv_path else self.folder / "eval.csv"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.predictions_path = self.folder / "predictions.jsonl"

        self.main = main
        self.elapsed_offset = elapsed_offset
        self._start = time.monotonic()

        self._config = config
        self._waiting = list(trackers)  # names of those that have not started
        self._trackers: list[Any] = []
        self._after: int | None = None  # the step that the run goes on from
        if main:
            self._open()

    def _open(self) -> None:
        try:
            check_csv(self.csv_path)
            check_trackers(self._waiting)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.csv_path.parent.mkdir(parents=True, exist_ok=True)
            for path in (self.csv_path, self.metrics_path, self.predictions_path):
                _cut_torn_line(path)  # only after the header has shown that the CSV is ours
        except OSError as error:
            raise ValueError(f"cannot open the logs in {self.folder}: {error.filename}: {error.strerror}; choose a "
                             "--save_dir and --log_csv that can be written") from error

        if not self.csv_path.exists() or self.csv_path.stat().st_size == 0:
            _append(self.csv_path, _csv_line(EVAL_HEADER), sync=True)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def elapsed_s(self) -> float:
        """Seconds of this run, those before a resume (`elapsed_offset`) included."""
        return self.elapsed_offset + time.monotonic() - self._start

    def log(self, step: int, **metrics: Any) -> None:
        """One line in metrics.jsonl, the numbers to the trackers as well. NaN and infinity are written as null."""
        if not self.main:
            return
        record = {"step": int(step), "elapsed_s": round(self.elapsed_s, 3), **plain(metrics)}
        _append(self.metrics_path, _json_line(record), sync=False)

        # Only now, so that a run which ends before its first step leaves nothing with a tracker.
        while self._waiting:
            name = self._waiting.pop(0)
            self._trackers.append(start_tracker(name, self.folder, self._config, self._after))

        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for tracker in self._trackers:
            tracker.log(numbers, step=int(step))

    def eval_rows(self, rows: list[dict[str, Any]]) -> None:
        """Appends whole rows to the CSV in one write; missing values are empty, `elapsed_s` is added."""
        if not self.main or not rows:
            return

        lines = []
        for row in rows:
            row = {"elapsed_s": self.elapsed_s, **row}  # a row that knows its time keeps it
            row = {name: value for name, value in row.items() if name not in OPTIONAL}
            assert set(row) <= set(EVAL_HEADER), f"no such column: {sorted(set(row) - set(EVAL_HEADER))}"
            assert "step" in row, "truncate_after needs the step of every row"
            lines.append(_csv_line(row.get(column) for column in EVAL_HEADER))

        _append(self.csv_path, "".join(lines), sync=True)

    def predictions(self, lines: list[dict[str, Any]]) -> None:
        """Appends to predictions.jsonl; every line needs its `step`, so that a resumed run can drop it."""
        if not self.main or not lines:
            return
        assert all("step" in line for line in lines), "truncate_after needs the step of every prediction"
        _append(self.predictions_path, "".join(map(_json_line, lines)), sync=True)

    def truncate_after(self, step: int, evaluate: bool = False) -> None:
        """Drops what was recorded after `step`, the step a run resumes from, so that nothing is recorded twice.

        With `evaluate` the run goes on with the evaluation of `step`, so that of before is dropped as well.
        """
        if not self.main:
            return
        self._after = step
        evaluated = step - 1 if evaluate else step
        _rewind(self.csv_path, evaluated, header=1)
        _rewind(self.metrics_path, step)
        _rewind(self.predictions_path, evaluated)

    def close(self) -> None:
        """Ends the trackers that have started."""
        while self._trackers:
            self._trackers.pop().finish()
