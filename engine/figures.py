"""Figures for people: matplotlib without a display, readable in grey, written whole or not at all; a run's curve."""

from __future__ import annotations

import csv
import logging
import math
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from engine.files import json_lines, staged
from engine.protocol import Key, key_of, measured_by_others

# Distinguishable without colour: by dash, marker and tone together.
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (8, 2)))
MARKERS = "osD^vPX*<>"

# In a run's own curve the plain dash is the bare LLM's.
TASK_DASHES = ("-", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
WINDOWS = 25  # the loss of a curve is averaged over 1 / WINDOWS of the logged steps
NUMBERS = ("step", "value", "ci_low", "ci_high", "bare", "segments_used", "elapsed_s")

Row = dict[str, float]


def quiet_matplotlib() -> None:
    """Called before matplotlib is imported: it would complain of a home that cannot be written, and do without."""
    logging.getLogger("matplotlib").setLevel(logging.ERROR)


def style(index: int, count: int) -> dict[str, Any]:
    """Line style, marker and grey tone of curve `index` of `count`."""
    return {
        "color": str(round(0.65 * index / max(count - 1, 1), 3)),
        "linestyle": DASHES[index % len(DASHES)],
        "marker": MARKERS[index % len(MARKERS)],
        "markersize": 5,
    }


def new_figure(columns: int, rows: int = 1, width: float = 5.0, height: float = 4.0) -> tuple[Any, list[Any]]:
    """(figure, its axes row by row) of `rows` x `columns` panels, each `width` x `height` inches."""
    quiet_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * columns, height * rows), layout="constrained", dpi=120)
    FigureCanvasAgg(figure)  # no pyplot, no display
    return figure, list(figure.subplots(rows, columns, squeeze=False).flat)


def save_figure(figure: Any, paths: Sequence[Path]) -> None:
    """Writes the figure to each path, in the format of its suffix (.png, .svg). Raises OSError."""
    for path in map(Path, paths):
        metadata = None
        if path.suffix == ".svg":
            metadata = {"Date": None}  # no date: the same figures give the same file
        with staged(path.parent, [path.name]) as (file,):
            figure.savefig(file, format=path.suffix.removeprefix("."), metadata=metadata)


# --- what a run recorded ----------------------------------------------------------------------------------------------


def read_losses(path: Path, key: str = "loss") -> list[Row]:
    """`step`, `elapsed_s` and `value` of each line of a metrics.jsonl that has a finite loss, in file order.

    `key` names the loss; lines without it have the value of `loss`. What a crash cut off is left out.
    """
    rows = []
    for _, record in json_lines(path, skip_damaged=True):
        try:
            value = float(record.get(key, record["loss"]))
            rows.append({"step": float(record["step"]), "elapsed_s": float(record["elapsed_s"]), "value": value})
        except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # no step, or a loss that is null
            continue
    return rows


def read_solved(path: Path, run: str = "", left_out: Collection[Key] = ()) -> dict[str, list[Row]]:
    """Task -> its 'solved' rows of an eval.csv, in file order; cells that are no numbers are left out.

    `run` leaves out what other runs have written to the same file, `left_out` whole evaluations, such as those of
    `engine.protocol.measured_by_others`. A file that is missing has no rows.
    """
    tasks: dict[str, list[Row]] = {}
    for row in table_rows(path, run):
        if key_of(row) in left_out:
            continue
        numbers = {}
        for key in NUMBERS:
            number = _number(row.get(key))
            if number is not None:
                numbers[key] = number

        # A row that a crash cut off lacks its last columns.
        if row.get("metric") == "solved" and {"step", "value", "elapsed_s"} <= numbers.keys():
            tasks.setdefault(row["task"], []).append(numbers)
    return tasks


def table_rows(path: Path, run: str = "") -> Iterator[dict[str, Any]]:
    """The rows of an evaluation table as text, without those of other runs than `run`; none where it is missing."""
    if not path.is_file():
        return
    with open(path, newline="", encoding="utf-8", errors="replace") as file:
        for row in csv.DictReader(file):
            if not run or row.get("run") in (run, "", None):
                yield row


def _number(text: str | None) -> float | None:
    """The cell's number; None for an empty cell, text and NaN."""
    try:
        number = float(text or "nan")
    except ValueError:
        return None
    if math.isnan(number):
        return None
    return number


def column(rows: Sequence[Row], key: str, scale: float = 1.0) -> list[float]:
    """The values of one key, times `scale`: 100 makes percents of shares."""
    return [scale * row[key] for row in rows]


def smoothed(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place; of fewer at the start."""
    means = []
    for end in range(1, len(values) + 1):
        recent = values[max(0, end - window) : end]
        means.append(sum(recent) / len(recent))
    return means


# --- a run's curve ----------------------------------------------------------------------------------------------------


def draw_curve(folder: Path, csv_path: Path | None = None, run: str = "") -> Path | None:
    """Draws loss and solved rate of a run into `<folder>/curve.png`; None when there is nothing to draw.

    `csv_path` None means `<folder>/eval.csv`; `run` as in `read_solved`. Raises OSError.
    """
    folder = Path(folder)
    losses = read_losses(folder / "metrics.jsonl")
    tasks = read_solved(Path(csv_path) if csv_path else folder / "eval.csv", run, measured_by_others(folder))
    if not losses and not tasks:
        return None

    # An empty panel stays hidden.
    figure, (left, right) = new_figure(2)
    if losses:
        draw_losses(left, losses)
    if tasks:
        draw_tasks(right, tasks)
    for axes, drawn in ((left, losses), (right, tasks)):
        axes.grid(alpha=0.3)
        axes.set_visible(bool(drawn))

    save_figure(figure, [folder / "curve.png"])
    return folder / "curve.png"


def draw_losses(axes: Any, losses: Sequence[Row]) -> None:
    """Each logged loss in light grey, their running mean above it."""
    steps = column(losses, "step")
    values = column(losses, "value")
    window = max(1, len(values) // WINDOWS)
    axes.plot(steps, values, color="0.75", linewidth=0.8, label="each logged step")
    axes.plot(steps, smoothed(values, window), color="0.1", linewidth=1.8, label=f"mean of {window}")
    axes.set(title="training loss", xlabel="step", ylabel="loss")
    axes.legend(fontsize=8)


def draw_tasks(axes: Any, tasks: dict[str, list[Row]]) -> None:
    """Each task's solved rate with its 95 % band, and the bare LLM's newest rate as a dashed line."""
    for index, (task, rows) in enumerate(tasks.items()):
        # The rate itself.
        tone = str(0.75 * index / max(1, len(tasks)))
        marker = MARKERS[index % len(MARKERS)]
        dash = TASK_DASHES[index % len(TASK_DASHES)]
        steps = column(rows, "step")
        rates = column(rows, "value", 100)
        axes.plot(steps, rates, color=tone, marker=marker, markersize=5, linestyle=dash, label=task)

        # Its band, at the evaluations that have an interval.
        band = [row for row in rows if {"ci_low", "ci_high"} <= row.keys()]
        low = column(band, "ci_low", 100)
        high = column(band, "ci_high", 100)
        axes.fill_between(column(band, "step"), low, high, color=tone, alpha=0.15, linewidth=0)

        # The bare LLM is measured once: a line over the whole run.
        bare = [row for row in rows if "bare" in row]
        if bare:
            rate = 100 * bare[-1]["bare"]
            look = {"linestyle": "--", "linewidth": 1, "markersize": 5, "markerfacecolor": "white"}
            label = f"{task}, bare LLM"
            axes.plot([0, max(steps) or 1], [rate, rate], color=tone, marker=marker, label=label, **look)

    axes.set(title="solved, generated answers (95 % interval)", xlabel="step", ylabel="solved, %", ylim=(-2, 102))
    axes.legend(fontsize=8, framealpha=0.6)
