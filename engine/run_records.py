"""What a run has recorded, read back: its flags, its newest evaluation of each task, its newest answers.

Everything is read from the run's folder alone, of any system and of earlier versions. What is missing is empty: a run
that crashed, or records that an earlier version did not keep, are no error.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.figures import table_rows
from engine.files import json_lines
from engine.ownership import known_id
from engine.protocol import CONFIG, Key, Protocol, key_of, read_flags, read_protocols

NO_SCORE = "perplexity"  # metric of a task whose predictions are documents: its scores are nats
NUMBERS = ("value", "n", "ci_low", "ci_high", "bare", "segments_used", "elapsed_s", "chance")


@dataclass(frozen=True)
class Item:
    """One evaluated item: a line of predictions.jsonl, under names that do not change."""

    name: str
    task: str
    question: str  # "" where an earlier version did not keep it
    gold: str | None
    text: str
    answer: str  # what was judged of the text
    bare: str | None  # what the bare LLM answered; None where it was not kept, or there is none
    score: float
    solved: bool
    bare_solved: bool | None  # None: nothing to compare with
    finished: bool
    segments: float | None

    @property
    def gained(self) -> bool:
        """The bare LLM was wrong, and this is right."""
        return self.bare_solved is False and self.solved

    @property
    def lost(self) -> bool:
        """The bare LLM was right, and this is wrong."""
        return self.bare_solved is True and not self.solved


@dataclass
class RunRecords:
    """What a run has recorded.

    folder: the run's folder.
    run: its id; "" where it has none.
    flags: every flag by name; empty where the run has left none.
    rows: of eval.csv in file order, this run's alone: text where `NUMBERS` does not name the column, else a number or
        None.
    items: the answers of each task's newest evaluation.
    protocols: how the evaluations were made; earlier versions did not record it.
    """

    folder: Path
    run: str
    csv_path: Path
    flags: dict[str, Any] = field(default_factory=dict)
    rows: list[dict[str, Any]] = field(default_factory=list)
    items: list[Item] = field(default_factory=list)
    protocols: dict[Key, Protocol] = field(default_factory=dict)

    def newest(self) -> dict[str, dict[str, dict[str, Any]]]:
        """Task -> metric -> its row of the newest evaluation, at the newest step that evaluated the task."""
        last = last_steps(self.rows)
        tasks: dict[str, dict[str, dict[str, Any]]] = {}
        for row in self.rows:
            if row["step"] != last[row["task"]]:
                continue

            # One checkpoint may be evaluated several times, each with metrics of its own.
            known = tasks.setdefault(row["task"], {})
            if any(key_of(other) != key_of(row) for other in known.values()):
                known.clear()
            known[row["metric"]] = row
        return tasks

    def protocol(self, rows: Mapping[str, Mapping[str, Any]]) -> Protocol | None:
        """How the rows of one evaluation were made; None where it was not recorded."""
        return next((self.protocols.get(key_of(row)) for row in rows.values()), None)

    @property
    def step(self) -> float | None:
        """The newest step that was evaluated."""
        return max((row["step"] for row in self.rows), default=None)


def read_run(folder: Path, csv_path: Path | None = None) -> RunRecords:
    """The records of the run in `folder`.

    `csv_path` is its evaluation table; None: that of its --log_csv, else eval.csv in the folder.

    Raises:
        ValueError: the folder is no run: it holds neither flags, evaluations nor logged steps.
        OSError: a file cannot be read.
    """
    folder = Path(folder)
    flags = read_flags(folder)
    if csv_path is None:
        csv_path = Path(flags.get("log_csv") or folder / "eval.csv")

    run = known_id(folder)
    records = RunRecords(folder, run, csv_path, flags, read_rows(csv_path, run))
    if not (flags or records.rows or (folder / "metrics.jsonl").exists()):
        raise ValueError(f"{folder} is no run: it holds no {CONFIG}, eval.csv or metrics.jsonl; give a run's folder")
    unscored = {row["task"] for row in records.rows if row["metric"] == NO_SCORE}
    records.protocols = read_protocols(folder)
    records.items = read_items(folder / "predictions.jsonl", unscored)
    return records


def read_rows(path: Path, run: str = "") -> list[dict[str, Any]]:
    """The rows of a run in an evaluation table, see `RunRecords.rows`; damaged ones are left out."""
    rows: list[dict[str, Any]] = []
    for row in table_rows(path, run):
        numbers = {name: number_of(row.get(name)) for name in (*NUMBERS, "step")}

        # A row that a crash cut off lacks its last columns.
        if numbers["step"] is None or numbers["value"] is None or not row.get("task") or not row.get("metric"):
            continue
        rows.append({"task": row["task"], "metric": row["metric"], **numbers})

    return rows


def number_of(text: str | None) -> float | None:
    """The number in a cell; None for an empty cell and for text."""
    try:
        return float(text) if text else None
    except ValueError:
        return None


def last_steps(rows: Iterable[Mapping[str, Any]]) -> dict[str, float]:
    """Task -> the newest step among rows or prediction lines."""
    last: dict[str, float] = {}
    for row in rows:
        last[row["task"]] = max(row["step"], last.get(row["task"], row["step"]))
    return last


def read_items(path: Path, unscored: Iterable[str] = ()) -> list[Item]:
    """The answers of each task's newest evaluation, in file order; a task in `unscored` has none.

    One checkpoint may be evaluated several times. Each evaluation begins with the first item: the last one counts.
    """
    lines = []
    for _, line in json_lines(path, skip_damaged=True):
        if isinstance(line, dict) and {"step", "task", "id", "score", "prediction"} <= line.keys():
            lines.append(line)

    last = last_steps(lines)
    newest: dict[str, dict[str, Any]] = {}
    for line in lines:
        if line["step"] != last[line["task"]] or line["task"] in unscored:
            continue
        of_task = newest.setdefault(line["task"], {})
        if line["id"] in of_task:
            of_task.clear()
        of_task[line["id"]] = line

    return [item_of(line) for of_task in newest.values() for line in of_task.values()]


def item_of(line: Mapping[str, Any]) -> Item:
    """A line of predictions.jsonl, of any version."""
    bare_score = line.get("bare_score")
    bare_solved = None
    if bare_score is not None:
        bare_solved = bare_score == 1.0 and not line.get("bare_refused", False)
    text = str(line["prediction"])
    return Item(
        name=str(line["id"]),
        task=str(line["task"]),
        question=line.get("question") or "",
        gold=line.get("gold"),
        text=text,
        answer=line.get("answer", text),
        bare=line.get("bare_prediction"),
        score=line["score"],
        solved=line["score"] == 1.0 and not line.get("refused", False),
        bare_solved=bare_solved,
        finished=line.get("finished", True),
        segments=line.get("segments_used"),
    )


def spread(items: Sequence[Item], most: int) -> list[Item]:
    """At most `most` of the items: one of each task in turn, so that no task takes all the places."""
    queues: dict[str, list[Item]] = {}
    for item in items:
        queues.setdefault(item.task, []).append(item)

    taken: list[Item] = []
    for turn in range(max(map(len, queues.values()), default=0)):
        for queue in queues.values():
            if turn < len(queue) and len(taken) < most:
                taken.append(queue[turn])

    return taken
