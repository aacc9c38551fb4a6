"""What an evaluation hands to the loop, and how every system writes rows for the CSV and tables for people."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.intervals import wilson
from engine.records import question_hash

LONGEST_QUESTION = 4000  # characters of it in predictions.jsonl: a document of the suite may be a book

@dataclass(frozen=True)
class Report:
    """One evaluation as the loop writes it down. The loop adds `step` and `elapsed_s` to rows and predictions."""

    rows: list[dict[str, Any]]  # of eval.csv, see `metric_row`
    predictions: list[dict[str, Any]]  # of predictions.jsonl, one for each item
    table: str  # the figures for people, several lines
    value: float = 0.0  # what --save_best_model compares; more is better
    notes: str = ""  # one line below the closing table
    question: str | None = None  # an evaluated question, for the closing hint to `generate.py`
    details: Any = None  # what only the system that measured can read
    solved: float | None = None  # share of all items solved, where `value` is another figure
    loss: float | None = None  # held-out loss in nats a token, where it is measured
    tokens: Mapping[str, int] = field(default_factory=dict)  # longest answers in tokens, by who answers

    @property
    def rate(self) -> float:
        """What --patience_on solved watches: the solved rate; with a curriculum the levels count, too."""
        return self.value if self.solved is None else self.solved


@dataclass(frozen=True)
class Card:
    """The README.md of a checkpoint: what the weights are, how far they are trained, how they load."""

    library: str  # peft or transformers; "" where no library loads the folder
    tags: Sequence[str]
    title: str
    trained: str  # follows "Step N" at once, so it begins with its own space or punctuation
    loading: str = ""  # how the folder loads

    def text(self, step: int, table: str = "") -> str:
        """The file's text after `step` batches, with the newest evaluation where there is one."""
        library = f"library_name: {self.library}\n" if self.library else ""
        head = f"---\n{library}tags: [{', '.join(self.tags)}]\n---\n\n# {self.title}\n\n"

        # Every part but the first line may be missing.
        body = f"Step {step}{self.trained}\n"
        if self.loading:
            body += f"{self.loading}\n"
        if table:
            body += f"\n```\n{table}\n```\n"
        return head + body


def metric_row(
    task: str, metric: str, value: float, n: int, *, interval: tuple[float, float] | None = None,
    bare: float | None = None, segments_used: float | None = None,
) -> dict[str, Any]:
    """One row of eval.csv without `step` and `elapsed_s`, which the loop adds.

    `n` is the number of items (of tokens, for a loss). `interval` is the 95 % interval of `value`. `bare` is the value
    of what the model is compared with: the bare LLM, or the start of a stage.
    """
    low, high = interval or (None, None)

    return {
        "task": task,
        "metric": metric,
        "value": value,
        "n": n,
        "ci_low": low,
        "ci_high": high,
        "bare": bare,
        "segments_used": segments_used,
    }


def prediction_line(
    task: str, index: int, question: str, text: str, score: float, gold: str | None = None, **more: Any
) -> dict[str, Any]:
    """One line of predictions.jsonl without `step`, which the loop adds; paired statistics need it.

    `index` counts the items of `task` from 0. `gold` is the answer that is asked for; None where there is none to show.
    `more` are further fields, such as `bare_score`. Of a longer question the first `LONGEST_QUESTION` characters stay.
    """
    return {
        "id": f"{task}/{index:05d}",
        "task": task,
        "prompt_hash": question_hash(question),
        "question": question[:LONGEST_QUESTION],
        "gold": gold,
        "prediction": text,
        "score": score,
        **more,
    }


def stamped(lines: Sequence[dict[str, Any]], step: int, elapsed_s: float | None = None) -> list[dict[str, Any]]:
    """Rows or predictions with the step they belong to, and the run's seconds where rows need them."""
    stamp: dict[str, Any] = {"step": step}
    if elapsed_s is not None:
        stamp["elapsed_s"] = elapsed_s
    return [stamp | line | stamp for line in lines]


def text_table(rows: Sequence[Sequence[str]], align: str = "", widths: Sequence[int] = ()) -> str:
    """Cells in columns, two blanks apart, no blanks at the end of a line. The first row is the heading.

    `align` has `<` or `>` for each column (all `<` when empty). `widths` are the least widths of the first columns.
    """
    columns = list(zip(*rows, strict=True))
    align = align or "<" * len(columns)

    # A column is as wide as its longest cell, or as `widths` demands.
    least = [*widths, *[0] * (len(columns) - len(widths))]
    broad = []
    for width, column in zip(least, columns, strict=True):
        broad.append(max(width, *map(len, column)))

    lines = []
    for row in rows:
        cells = [f"{cell:{side}{width}}" for cell, side, width in zip(row, align, broad, strict=True)]
        lines.append("  ".join(cells).rstrip())

    return "\n".join(lines)


def percent(value: float, interval: tuple[float, float] | None = None) -> str:
    """A share in 0..1 for people, with its interval where it has one: `41.2 % [35.0, 47.7]`."""
    text = f"{100 * value:.1f} %"
    if interval is None:
        return text

    low, high = interval
    return f"{text} [{100 * low:.1f}, {100 * high:.1f}]"


@dataclass(frozen=True)
class AnswerLine:
    """One line of the closing table: how many of a task's items were solved by one who answers.

    name: who answers, and what it is given.
    n: items.
    strict, extracted: items solved by the whole text, and by the answer taken out of it.
    cut: answers cut off at the limit of tokens.
    """

    name: str
    n: int
    strict: int
    extracted: int
    cut: int


@dataclass(frozen=True)
class TaskLines:
    """What the closing table says of a task.

    task: its name.
    lines: one for each who answers; the last is the model that is measured.
    gain: the model's solved rate minus that of the bare LLM's best protocol; None = nothing to compare with.
    over: the name of that protocol.
    chance: share that the best constant answer solves; None = not known.
    """

    task: str
    lines: Sequence[AnswerLine]
    gain: float | None = None
    over: str = ""
    chance: float | None = None


def format_table(tasks: Sequence[TaskLines]) -> str:
    """The closing table as text: each task's answers in lines of their own, the gain in percentage points."""
    with_chance = any(task.chance is not None for task in tasks)
    heading = ["task", "n", "answers of", "strict", "extracted", "cut", "gain"]
    cells = [[*heading, "chance"] if with_chance else heading]
    for task in tasks:
        for line in task.lines:
            is_first = line is task.lines[0]
            is_last = line is task.lines[-1]
            row = [task.task, str(line.n)] if is_first else ["", ""]
            row.append(line.name)
            for solved in (line.strict, line.extracted):
                row.append(percent(solved / line.n, wilson(solved, line.n)))
            row.append(str(line.cut))
            row.append(_gain_cell(task) if is_last else "")
            if with_chance:
                row.append(percent(task.chance) if is_first and task.chance is not None else "")
            cells.append(row)

    return text_table(cells, "<><<<><" + "<" * with_chance, (16, 4))


def _gain_cell(task: TaskLines) -> str:
    """The gain, and the protocol of the bare LLM that it is over."""
    if task.gain is None:
        return "-"
    # The sum with 0.0 keeps a rounded -0.0 from showing its sign.
    return f"{round(100 * task.gain, 1) + 0.0:+.1f} over {task.over}"


def closing_words(
    csv: Path, checkpoint: Path | None, curve: Path | None, question: str | None, *, samples: Path | None = None,
    compare: bool = True, page: Path | None = None,
) -> str:
    """Where a run has left its files, one a line, and the command that puts `question` to its checkpoint.

    `compare` adds --compare, which answers beside what the model is compared with.
    """
    files = {"evaluation:": csv, "samples:": samples, "checkpoint:": checkpoint, "curve:": curve,
             "report:": page}
    lines = [f"{what:11} {path}" for what, path in files.items() if path]

    if question:
        # One line, whatever the question holds.
        prompt = shlex.quote(" ".join(question.split()))
        if prompt.strip("'").startswith("-"):  # it would be taken for a flag
            prompt = f"={prompt}"
        else:
            prompt = f" {prompt}"
        beside = "--compare " if compare else ""
        place = shlex.quote(str(checkpoint))
        lines.append(f"next:       python generate.py --checkpoint {place} {beside}--prompt{prompt}")

    return "\n".join(lines)
