"""Solved against the number of steps that an item needs; the part of depth_curve.py for the depth probes."""

from __future__ import annotations

import re
import sys
from collections.abc import Container, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from engine.figures import style  # noqa: E402
from plot_tools import curve_of, draw_line, finish, where  # noqa: E402
from reasoning_gym_wrapper import Example, Reserve, Task, read_task_config  # noqa: E402
from tasks.toy_base import StepsConfig  # noqa: E402

Row = dict[str, Any]
LABEL = re.compile(r"steps (\d+)")  # a difficulty that is a number of steps
LAST = "last"  # the readout with halting off
OWN = "own"  # the readout where each item has as many segments as it needs steps


def read_steps(text: str) -> list[int]:
    """`1-4,8` as [1, 2, 3, 4, 8]; empty text as no steps. Raises ValueError."""
    steps: set[int] = set()
    for part in filter(None, text.split(",")):
        match = re.fullmatch(r"\s*(\d{1,3})(?:-(\d{1,3}))?\s*", part)
        if match is None:
            raise ValueError(f"--steps {text!r} is not legal: expected whole numbers and ranges, such as 1-8,12,16")
        low = int(match[1])
        high = int(match[2] or low)
        if not 1 <= low <= high:
            raise ValueError(f"--steps {text!r} is not legal: {part} is no range of numbers from 1 up")
        steps.update(range(low, high + 1))
    return sorted(steps)


def trained_steps(tasks: Sequence[Task]) -> dict[str, int]:
    """Task -> most steps that it is trained on; of tasks with that knob."""
    most = {}
    for task in tasks:
        config = task.scorer.config
        if isinstance(config, StepsConfig):
            most[task.name] = config.max_steps
    return most


def changed(tasks: Sequence[Task], text: str) -> list[Task]:
    """The tasks with the fields of a `--task_config` in place of their own, at one step; "" changes nothing.

    Decoys of toy_chain that the text does not name are left out: they fit the run's own shape.

    Raises:
        TaskError: as `read_task_config` and `Task`.
    """
    if not text:
        return list(tasks)
    given = read_task_config(text, [task.name for task in tasks])
    shaped = []
    for task in tasks:
        plain = {"decoys": 0} if "decoys" in task.config else {}
        fields = {"min_steps": 1, "max_steps": 1} | plain | given[task.name]
        shaped.append(Task(task.name, task.config | fields, task.limits))
    return shaped


def items_by_steps(
    tasks: Sequence[Task], steps: Sequence[int], n: int, seed: int, trained: Container[str] = ()
) -> list[Example]:
    """`n` items of each task for each number of steps, drawn with the evaluation's seed, none of them in `trained`.

    Raises:
        ValueError: a task has no number of steps to set, refuses one, or has fewer items.
    """
    without = [task.name for task in tasks if not isinstance(task.scorer.config, StepsConfig)]
    if without:
        raise ValueError(f"--steps is of tasks with max_steps in their config: {', '.join(without)} has none")
    examples = []
    for task in tasks:
        for count in steps:
            own = Task(task.name, task.config | task.scorer.config.at(count), task.limits)
            examples += Reserve([own], n, seed, trained=trained).examples
    return examples


def note_of_steps(trained: Mapping[str, int]) -> str:
    """Which items are not those that training was kept off, one line."""
    most = ", ".join(f"{task} up to {count}" for task, count in trained.items())
    return (
        f"WARNING: training kept off the run's own evaluation items alone; items of trained numbers of steps ({most}) "
        "are drawn anew and a few may have been trained on"
    )


def add_steps(rows: Sequence[Row], trained: Mapping[str, int]) -> None:
    """Adds the columns `steps` and `beyond_training` (1: more steps than were trained) where a row has one number.

    A task without that knob, which `trained` does not name, is measured on items like those of training: none is more.
    """
    for row in rows:
        match = LABEL.fullmatch(row["difficulty"])
        if match:
            row["steps"] = int(match[1])
            row["beyond_training"] = int(row["steps"] > trained.get(row["task"], row["steps"]))


def by_task(rows: Sequence[Row], readout: str = LAST) -> dict[str, list[Row]]:
    """Task -> its rows of one readout that are of one number of steps each; other tasks are left out."""
    found: dict[str, list[Row]] = {}
    for row in where(rows, readout=readout):
        if "steps" in row:
            found.setdefault(row["task"], []).append(row)
    return found


def steps_table(rows: Sequence[Row]) -> list[str]:
    """What the terminal shows of each task: a line for each number of steps, a column for each of segments."""
    lines = []
    for task, own in by_task(rows).items():
        depths = sorted(set(map(itemgetter("segments"), own)))
        lines.append(f"{task}: solved, %, by steps (+ = more than trained) and segments {', '.join(map(str, depths))}")
        for steps in sorted(set(map(itemgetter("steps"), own))):
            members = sorted(where(own, steps=steps), key=itemgetter("segments"))
            mark = "+" if members[0]["beyond_training"] else " "
            cells = "".join(f"{100 * row['solved']:8.1f}" for row in members)
            lines.append(f"{steps:6d}{mark} n {members[0]['n']:<5d}{cells}")

    for task, own in by_task(rows, OWN).items():
        lines.append(f"{task}: solved, %, where each item has as many segments as it needs steps")
        for row in sorted(own, key=itemgetter("steps")):
            mark = "+" if row["beyond_training"] else " "
            lines.append(f"{row['steps']:6d}{mark} n {row['n']:<5d}{100 * row['solved']:8.1f}")
    return lines


def draw_steps(axes: Any, task: str, rows: Sequence[Row], trained: int | None) -> None:
    """Solved rate over the steps needed, one curve with its band for each number of segments."""
    depths = sorted(set(map(itemgetter("segments"), rows)))
    for index, segments in enumerate(depths):
        own = sorted(where(rows, segments=segments), key=itemgetter("steps"))
        label = f"{segments} segments" if segments else "no segments"
        draw_line(axes, index, len(depths), label, curve_of(own, "steps"))

    if trained is not None:
        axes.axvline(trained + 0.5, color="0.6", linestyle=":", linewidth=1)
    finish(
        axes,
        title=f"{task}: by steps needed",
        xlabel="steps" if trained is None else "steps (right of the dotted line: more than trained)",
        ylabel="solved, % (95 %)",
        ylim=(-2, 102),
    )


def draw_used(axes: Any, task: str, rows: Sequence[Row]) -> None:
    """Segments used over the steps needed, where an example stops when it has settled; one curve for each limit."""
    limits = sorted(set(map(itemgetter("segments"), rows)))
    for index, limit in enumerate(limits):
        own = sorted(where(rows, segments=limit), key=itemgetter("steps"))
        axes.plot([row["steps"] for row in own], [row["segments_used"] for row in own], label=f"at most {limit}",
                  **style(index, len(limits)))

    title = f"{task}: segments until the answer settles"
    finish(axes, title=title, xlabel="steps needed", ylabel="mean segments used", ylim=(0, max(limits) + 1))
