"""All tasks of a run together: Reasoning Gym's, built-in ones, plugins', own data; and their shares in training."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from own_tasks.source import LARGE, size_of, source_of
from own_tasks.stream import StreamedTask
from own_tasks.table import OwnDataConfig
from own_tasks.task import OwnTask
from reasoning_gym_wrapper import Task, TaskError, make_tasks
from tasks.limits import USUAL, JudgeConfig
from tasks.steps import steps_of

FIRST_ITEMS = 20  # of a task, that stand for the others


def own_task(own: OwnDataConfig, limits: JudgeConfig = USUAL) -> OwnTask:
    """Own data as a task, a stream where they are large. Raises TaskError."""
    try:
        size = size_of(source_of(own.data, "--data"))
    except ValueError as error:
        raise TaskError(str(error)) from error

    if size > LARGE:
        return StreamedTask(own, limits)
    return OwnTask(own, limits)


def tasks_with_own(
    names: Sequence[str], config_text: str, own: OwnDataConfig, limits: JudgeConfig = USUAL
) -> list[Task | OwnTask]:
    """The chosen tasks, and behind them the own data where there is any. Raises TaskError."""
    tasks: list[Task | OwnTask] = list(make_tasks(names, config_text, limits))
    if own.data:
        tasks.append(own_task(own, limits))
    return tasks


def own_problems(
    names: Sequence[str], own: OwnDataConfig, mix: str | None, eval_n: int, trains: bool, limits: JudgeConfig = USUAL,
    is_fixed: bool = False,
) -> list[str]:
    """Every reason why own data and the mix cannot be used as asked, one line each.

    `names` are the other tasks. With `is_fixed` the run needs a fixed set of training items.
    """
    lines = []
    every = list(names)
    if own.data:
        try:
            task = own_task(own, limits)
        except TaskError as error:
            return [str(error)]

        lines += task.problems(eval_n, trains)
        if is_fixed and not names and not task.is_fixed:
            lines.append(f"--data {own.data} are large and read as a stream: --epochs and --cache_hidden need a fixed "
                         "set, choose --train_n")
        every.append(task.name)

    # The mix names tasks and own data alike.
    try:
        mix_weights(mix, every)
    except TaskError as error:
        lines.append(str(error))
    return lines


def steps_problems(
    names: Sequence[str], config_text: str, own: OwnDataConfig, limits: JudgeConfig = USUAL
) -> list[str]:
    """One line where segments are to follow from an item's steps, and some task does not say them."""
    # The first items stand for their task: most say it or none, a grid without a solution does not.
    without = []
    for task in tasks_with_own(names, config_text, own, limits):
        first = itertools.islice(task.items(0), FIRST_ITEMS)
        if all(steps_of(example.entry) is None for _, example in first):
            without.append(task.name)

    if not without:
        return []
    return [f"--segments_sampling steps and item need to know how many steps an item needs, and {', '.join(without)} "
            "does not say: choose uniform, a depth probe such as toy_chain, or own data with a field \"steps\""]


# --- shares of a mix --------------------------------------------------------------------------------------------------


def mix_weights(mix: str | None, names: Sequence[str]) -> list[float] | None:
    """The weight of each task by `--mix NAME=WEIGHT,...`; None without it. A task that is not named weighs 1.

    Raises:
        TaskError: one line: a name that is none of `names`, or that stands twice, or a weight that is none.
    """
    if mix is None:
        return None

    weights: dict[str, float] = {}
    for part in mix.split(","):
        name, _, weight = part.partition("=")
        name = name.strip()
        if name not in names:
            raise TaskError(f"--mix names {name}, which is no task of this run: choose from {', '.join(names)}")
        if name in weights:
            raise TaskError(f"--mix names {name} twice: keep one")

        # What is no number is told as one out of range.
        try:
            weights[name] = float(weight)
        except ValueError:
            weights[name] = 0.0
        if not 0 < weights[name] < math.inf:
            raise TaskError(f"--mix gives {name} the weight {weight.strip()}: expected a number above 0")
    return [weights.get(name, 1.0) for name in names]
