"""The part of plot_depth.py that counts: solved rates by steps of several arms, from the depth.csv of each seed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.intervals import mean_interval, wilson  # noqa: E402
from plot_tools import read_rows, where  # noqa: E402

# Column -> its type, its least and its greatest value.
NUMBERS = {
    "segments": (int, 0, math.inf),
    "steps": (int, 0, math.inf),
    "beyond_training": (int, 0, 1),
    "n": (int, 1, math.inf),
    "solved": (float, 0, 1),
}
NEEDED = ("task", "difficulty", "readout", *NUMBERS)
COLUMNS = ("arm", "segments", "steps", "beyond_training", "seeds", "n", "solved", "ci_low", "ci_high", "interval")
OVER_SEEDS = "t over seeds"
OVER_ITEMS = "Wilson over items"

Row = dict[str, Any]


# --- reading ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Run:
    """What one run solved.

    Attributes:
        path: its depth.csv.
        rows: the rows of one task that are of a number of steps with halting off, as they were read.
        cells: (segments, steps) -> the row's numbers: `segments`, `steps`, `beyond_training`, `n`, `solved`.
    """

    path: Path
    rows: list[Row]
    cells: dict[tuple[int, int], Row]


def read_run(path: Path, task: str) -> Run:
    """A run's rows of `task`, or of the one task that the file holds if it is empty.

    Raises:
        ValueError: no such file, columns or numbers, no rows of the task by steps, or several tasks and no `task`.
    """
    table = read_rows(path)
    missing = [name for name in NEEDED if name not in table[0]]
    if missing:
        raise ValueError(
            f"{path} lacks the column {', '.join(missing)}: expected a depth.csv that depth_curve.py wrote with --steps"
        )

    # Rows over all items have no number of steps.
    rows = [row for row in where(table, readout="last") if row["steps"]]
    tasks = sorted({row["task"] for row in rows})
    if not tasks or task and task not in tasks:
        wanted = f" of {task}" if task else ""
        held = f", only of {', '.join(tasks)}" if tasks else ""
        raise ValueError(f"{path} has no rows{wanted} by steps{held}: run depth_curve.py with --steps")
    if not task and len(tasks) > 1:
        raise ValueError(f"{path} holds several tasks ({', '.join(tasks)}): choose one with --task")

    # A repeated row would be two answers to one question: which of them counts?
    own = where(rows, task=task or tasks[0])
    cells: dict[tuple[int, int], Row] = {}
    for row in own:
        cell = numbers_of(row, path)
        place = (cell["segments"], cell["steps"])
        if place in cells:
            raise ValueError(f"{path} has two rows of {place[0]} segments and {place[1]} steps: measure it again")
        cells[place] = cell
    return Run(path, own, cells)


def numbers_of(row: Row, path: Path) -> Row:
    """The numbers of a row as `Run.cells` holds them. Raises ValueError."""
    cell: Row = {}
    for name, (kind, low, high) in NUMBERS.items():
        try:
            cell[name] = kind(row[name])
        except ValueError:
            cell[name] = math.nan

        # Not a number is in no range.
        if not low <= cell[name] <= high:
            span = f"of at least {low}" if high == math.inf else f"from {low} to {high}"
            raise ValueError(f"{path}: {name} is {row[name]!r} in a row of {row['difficulty']!r}: expected a number "
                             f"{span}; measure it again")
    return cell


def read_arms(arms: Mapping[str, Sequence[Path]], task: str) -> dict[str, list[Run]]:
    """Arm -> its runs. Raises ValueError with a line for each file that cannot be used."""
    runs: dict[str, list[Run]] = {}
    problems = []
    for name, paths in arms.items():
        for path in paths:
            try:
                runs.setdefault(name, []).append(read_run(path, task))
            except ValueError as error:
                problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))

    # All are of one task, and no two are copies: even one seed measured twice differs in its seconds.
    every = [run for members in runs.values() for run in members]
    first = every[0]
    for place, run in enumerate(every):
        if run.rows[0]["task"] != first.rows[0]["task"]:
            raise ValueError(f"{run.path} is of {run.rows[0]['task']}, {first.path} of {first.rows[0]['task']}: "
                             "draw one task at a time, or choose one with --task")
        for other in every[:place]:
            if run.rows == other.rows:
                raise ValueError(f"{run.path} and {other.path} hold the same rows: give each run once")
    return runs


# --- counting ---------------------------------------------------------------------------------------------------------


def shared_cells(name: str, runs: Sequence[Run]) -> tuple[list[tuple[int, int]], int]:
    """The (segments, steps) that all runs of an arm have, in order, and how many others there are.

    Raises:
        ValueError: there is none.
    """
    shared = set.intersection(*(set(run.cells) for run in runs))
    if not shared:
        raise ValueError(f"the {len(runs)} files of {name} have no steps in common at the same segments: measure all "
                         "with the same --steps and --segments")
    return sorted(shared), len(set.union(*(set(run.cells) for run in runs)) - shared)


def summary_of(name: str, cells: Sequence[Row]) -> Row:
    """A row of `COLUMNS` from the numbers of each seed at one place. Shares from 0 to 1; a t interval may pass them.

    `beyond_training` is 1 where it is so in every seed.
    """
    first = cells[0]
    mean = mean_interval([cell["solved"] for cell in cells])
    low = mean.low
    high = mean.high
    interval = OVER_SEEDS
    if len(cells) == 1:
        low, high = wilson(round(first["solved"] * first["n"]), first["n"])
        interval = OVER_ITEMS
    beyond = min(cell["beyond_training"] for cell in cells)
    n = sum(cell["n"] for cell in cells)
    values = (name, first["segments"], first["steps"], beyond, len(cells), n, mean.value, low, high, interval)
    return dict(zip(COLUMNS, values, strict=True))


def summary(arms: Mapping[str, Sequence[Run]]) -> tuple[list[Row], list[str]]:
    """The rows of `COLUMNS`, by arm, segments and steps; and notes for the user.

    Raises:
        ValueError: seeds of an arm, or the arms, have no steps in common.
    """
    rows: list[Row] = []
    notes = []
    for name, runs in arms.items():
        places, others = shared_cells(name, runs)
        if others:
            notes.append(f"{name}: {others} pairs of segments and steps are left out, because not all of its "
                         f"{len(runs)} files have them")
        rows += [summary_of(name, [run.cells[place] for run in runs]) for place in places]

    # Arms that share nothing make no comparison.
    steps_of = [set(values(where(rows, arm=name), "steps")) for name in arms]
    if not set.intersection(*steps_of):
        raise ValueError(f"the arms {', '.join(arms)} have no steps in common: measure all with the same --steps")
    return rows, notes + trained_notes(arms, rows)


def values(rows: Sequence[Row], name: str) -> list[Any]:
    """The distinct values of a column, in ascending order."""
    return sorted({row[name] for row in rows})


def trained_notes(arms: Mapping[str, Sequence[Run]], rows: Sequence[Row]) -> list[str]:
    """A line for each arm of which a run was not trained on all the steps that the figure shows as trained."""
    trained = {row["steps"] for row in rows if not row["beyond_training"]}
    notes = []
    for name, runs in arms.items():
        own = {steps for run in runs for (_, steps), cell in run.cells.items() if cell["beyond_training"]} & trained
        if own:
            listed = ", ".join(map(str, sorted(own)))
            notes.append(f"{name}: not every run was trained on steps {listed}, as others were")
    return notes


def beyond_from(rows: Sequence[Row]) -> float | None:
    """Where the steps begin that no arm was trained on: midway to the last that one was; None without such steps."""
    steps = values(rows, "steps")
    trained = [row["steps"] for row in rows if not row["beyond_training"]]
    last = max(trained, default=steps[0] - 1)
    later = [count for count in steps if count > last]
    if not later:
        return None
    return (last + later[0]) / 2


def raw_rows(arms: Mapping[str, Sequence[Run]]) -> list[Row]:
    """The rows as they were read, with `arm` and `file` before them; files are told from the folder that all lie in."""
    folders = [run.path.resolve().parent for runs in arms.values() for run in runs]
    base = os.path.commonpath(folders)
    rows = []
    for name, runs in arms.items():
        for run in runs:
            file = Path(os.path.relpath(run.path.resolve(), base)).as_posix()
            rows += [{"arm": name, "file": file} | row for row in run.rows]
    return rows
