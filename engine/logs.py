"""What a run leaves behind beside its checkpoints: eval.csv, metrics.jsonl, predictions.jsonl, evaluations.jsonl.

Rows appear whole or not at all, and a resumed run holds each step once. The table may be shared by several runs.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from engine.ownership import Claim, claim
from engine.protocol import EVALUATIONS, evaluation_line
from engine.records import plain
from engine.tables import append, append_rows, check_csv, open_table, rewind_records, rewind_rows
from engine.trackers import answer_rows, check_trackers, evaluation_numbers, log_answers, start_tracker


def _json_line(record: dict[str, Any]) -> str:
    return json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n"


class RunLog:
    """The records of one run.

    Everything that can be wrong is checked before anything is written. Trackers start at the first log.

    Args:
        folder: the run's folder.
        csv_path: the evaluation table; None = `<folder>/eval.csv`.
        trackers: names among `engine.trackers.TRACKERS`.
        config: every flag, for the trackers and for the protocol of the evaluations.
        main: False on other ranks, where every method does nothing.
        elapsed_offset: seconds of the run before a resume.
        alone: True keeps other processes out of the folder until `close`; False only adds to its records.

    Attributes:
        run: the run's id, which its rows bear; "" on other ranks.

    Raises:
        ValueError: a CSV with another header, an unknown or missing tracker, a folder that cannot be written or that
            another process writes.
    """

    def __init__(
        self,
        folder: Path,
        csv_path: Path | None,
        trackers: Sequence[str],
        config: dict[str, Any],
        main: bool = True,
        elapsed_offset: float = 0.0,
        alone: bool = True,
    ) -> None:
        self.folder = Path(folder)
        self.csv_path = Path(csv_path) if csv_path else self.folder / "eval.csv"
        self.metrics_path = self.folder / "metrics.jsonl"
        self.predictions_path = self.folder / "predictions.jsonl"
        self.evaluations_path = self.folder / EVALUATIONS

        self.main = main
        self.elapsed_offset = elapsed_offset
        self._start = time.monotonic()

        self._config = config
        self._waiting = list(trackers)  # names of those that have not started
        self._trackers: list[Any] = []
        self._after: int | None = None  # the step that the run goes on from
        self.claim = Claim("")
        if main:
            self._open(alone)

    @property
    def run(self) -> str:
        return self.claim.run

    def _open(self, alone: bool) -> None:
        try:
            check_csv(self.csv_path)
            check_trackers(self._waiting)
            self.folder.mkdir(parents=True, exist_ok=True)
            self.csv_path.parent.mkdir(parents=True, exist_ok=True)
            self.claim = claim(self.folder, alone)
        except OSError as error:
            raise ValueError(f"cannot open the logs in {self.folder}: {error.filename}: {error.strerror}; choose a "
                             "--save_dir and --log_csv that can be written") from error

        try:
            is_own = self.csv_path.resolve().parent == self.folder.resolve()
            open_table(self.csv_path, self.run, is_own, self.claim.before)
        except BaseException:
            self.claim.release()
            raise

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
        append(self.metrics_path, _json_line(record), sync=False)

        numbers = {key: value for key, value in record.items() if isinstance(value, int | float) and key != "step"}
        for tracker in self._started():
            tracker.log(numbers, step=int(step))

    def _started(self) -> list[Any]:
        """The trackers, which start only now: a run that ends before its first step leaves nothing with them."""
        while self._waiting:
            name = self._waiting.pop(0)
            self._trackers.append(start_tracker(name, self.folder, self._config, self._after))
        return self._trackers

    def evaluation(self, step: int, rows: list[dict[str, Any]], lines: list[dict[str, Any]],
                   tokens: Mapping[str, int] | None = None) -> None:
        """Writes down the evaluation of `step`: protocol, rows and prediction lines; shows it to the trackers.

        `tokens` as in `Report`.
        """
        # First: a line without rows does no harm, rows without a line would pass for another protocol's.
        if self.main and rows and self._config:
            append(self.evaluations_path, _json_line(evaluation_line(rows, self._config, tokens or {})))
        self.eval_rows(rows)
        self.predictions(lines)
        if not self.main:
            return

        answers = answer_rows(lines)
        numbers = evaluation_numbers(rows)
        for tracker in self._started():
            tracker.log(numbers, step=int(step))
            if answers:
                log_answers(tracker, answers, int(step))

    def eval_rows(self, rows: list[dict[str, Any]]) -> None:
        """Appends whole rows to the CSV in one write; missing values are empty, `elapsed_s` is added."""
        if not self.main or not rows:
            return

        # A row that knows its time keeps it.
        append_rows(self.csv_path, self.run, [{"elapsed_s": self.elapsed_s, **row} for row in rows])

    def predictions(self, lines: list[dict[str, Any]]) -> None:
        """Appends to predictions.jsonl; every line needs its `step`, so that a resumed run can drop it."""
        if not self.main or not lines:
            return
        assert all("step" in line for line in lines), "truncate_after needs the step of every prediction"
        append(self.predictions_path, "".join(map(_json_line, lines)))

    def truncate_after(self, step: int, evaluate: bool = False) -> None:
        """Drops what was recorded after `step`, the step a run resumes from, so that nothing is recorded twice.

        With `evaluate` the run goes on with the evaluation of `step`, so that of before is dropped as well.
        """
        if not self.main:
            return
        self._after = step or None
        evaluated = step - 1 if evaluate else step
        rewind_rows(self.csv_path, self.run, evaluated)
        rewind_records(self.metrics_path, step)
        rewind_records(self.predictions_path, evaluated)
        rewind_records(self.evaluations_path, evaluated)

    def close(self) -> None:
        """Ends the trackers that have started, and lets other processes have the folder."""
        self._waiting = []  # what is recorded after the end starts none
        while self._trackers:
            self._trackers.pop().finish()
        self.claim.release()
