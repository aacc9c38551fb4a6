"""`--curriculum`: each task climbs Reasoning Gym's own levels of difficulty as its held-out solved rate allows.

A level sets every attribute of the task's curriculum to that level (attributes with fewer levels stay at their last);
ranges run from the easiest value to the level's, so nothing learnt drops out. The evaluation items of ALL levels are
reserved before anything is trained: a question trained on at one level could else be evaluated at the next.

A task begins at its first level of at least `ENOUGH` distinct questions: chain_sum's first level has 200, half of them
held out; the rest are learnt by heart, and the held-out rate never rises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from engine.records import normalise
from engine.report import metric_row
from reasoning_gym_wrapper import Example, Reserve, Task, TaskError

Fits = Callable[[list[Example]], list[Example]]

ENOUGH = 1000  # distinct questions: with a few hundred, training repeats them within minutes and learns nothing else


def curriculum_problems(names: Sequence[str]) -> list[str]:
    """One line where some of the tasks have no curriculum; an empty list when all have one."""
    try:
        from reasoning_gym.factory import has_curriculum
    except ImportError:
        return ["--curriculum needs reasoning-gym: pip install reasoning-gym==0.1.25"]
    without = [name for name in names if not has_curriculum(name)]
    if not without:
        return []
    return [f"--curriculum: Reasoning Gym has no curriculum for {', '.join(without)}: choose other tasks"]


def level_configs(task: Task, highest: int = 0) -> list[dict[str, Any]]:
    """The task's config at each level, up to `highest` (0: the last); levels that change nothing are left out."""
    from reasoning_gym.factory import create_curriculum

    curriculum = create_curriculum(task.name)
    attributes = list(curriculum.attributes.values())
    fields = []
    for attribute in attributes:
        two = ("lower_field_name", "upper_field_name")
        names = [getattr(attribute, name) for name in (*two, "field_name") if hasattr(attribute, name)]
        fields += names
    last = max((len(attribute.levels) for attribute in attributes), default=1) - 1
    found: list[dict[str, Any]] = []
    for level in range((min(highest, last) if highest else last) + 1):
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration(dict(task.config))
        config = {**task.config, **{name: getattr(made, name) for name in fields}}
        if not found or config != found[-1]:
            found.append(config)
    return found


def ladder(task: Task, highest: int = 0) -> list[Task]:
    """The task at each of its levels, up to the first that its own configuration refuses.

    Raises:
        TaskError: it refuses the first level.
    """
    steps: list[Task] = []
    for config in level_configs(task, highest):
        try:
            steps.append(Task(task.name, config))
        except TaskError:
            if not steps:
                raise
            break
    return steps


class Curriculum:
    """Where each task stands, and the evaluation items of every level.

    `starts` has the level each task begins at: the first of `ENOUGH` questions, or 0 where none has as many. `n` items
    are evaluated at a level, or half of its distinct questions where it has fewer than 2n. `fits` leaves out items that
    are too long and raises ValueError where it may not; the ladder ends below such a level.

    Raises:
        TaskError, ValueError: the first level of a task cannot be used.
    """

    def __init__(self, tasks: Sequence[Task], threshold: float, n: int, seed: int, by_group: bool = True,
                 highest: int = 0, fits: Fits = lambda examples: examples):
        self.threshold = threshold
        self.ladders: dict[str, list[Task]] = {}
        self.held_out: dict[str, list[list[Example]]] = {}  # task -> level -> items
        self.starts: dict[str, int] = {}
        self.reserve = Reserve([], 0, by_group=by_group)
        for task in tasks:
            steps, items = [], []
            for step in ladder(task, highest):
                wanted = 2 * n if task.name in self.starts else max(2 * n, ENOUGH)
                found = Reserve([step], wanted, seed, must_fill=False, by_group=by_group).examples
                try:
                    drawn = fits(found[:2 * n])
                except ValueError:
                    if not steps:
                        raise
                    break
                if len(found) >= ENOUGH:
                    self.starts.setdefault(task.name, len(steps))
                steps.append(step)
                items.append(drawn[:min(n, max(len(drawn) // 2, 1))])
            self.ladders[task.name], self.held_out[task.name] = steps, items
            self.starts.setdefault(task.name, 0)
            self.reserve.examples += [example for level in items for example in level]
        self.reserve.questions = {normalise(example.question) for example in self.reserve.examples}
        self.levels = dict(self.starts)

    def tasks(self) -> list[Task]:
        """Each task at its level."""
        return [self.ladders[name][level] for name, level in self.levels.items()]

    def examples(self) -> list[Example]:
        """The evaluation items of the levels of now."""
        return [example for name, level in self.levels.items() for example in self.held_out[name][level]]

    def update(self, rates: Mapping[str, float]) -> list[str]:
        """Raises by one level each task whose solved rate reaches the threshold; returns those tasks."""
        raised = [name for name, level in self.levels.items()
                  if rates[name] >= self.threshold and level + 1 < len(self.ladders[name])]
        for name in raised:
            self.levels[name] += 1
        return raised

    def restore(self, levels: Mapping[str, int]) -> None:
        """The levels of a checkpoint; tasks it does not know keep theirs."""
        for name in self.levels:
            self.levels[name] = min(int(levels.get(name, self.levels[name])), len(self.ladders[name]) - 1)

    def rows(self) -> list[dict[str, Any]]:
        """CSV rows: the level that each task is evaluated at."""
        return [
            metric_row(name, "curriculum_level", level, len(self.held_out[name][level]))
            for name, level in self.levels.items()
        ]

    def told(self) -> str:
        """`chain_sum 2 of 10, gcd 0 of 4`"""
        return ", ".join(f"{name} {level} of {len(self.ladders[name]) - 1}" for name, level in self.levels.items())
