"""`--curriculum`: each task climbs its levels of difficulty as its held-out solved rate allows.

The levels are Reasoning Gym's, or those that the config of a built-in task says itself (`levels`). A level sets every
attribute of the task's curriculum to that level (attributes with fewer levels stay at their last).
Ranges run from the easiest value to the level's, so nothing learnt drops out. The evaluation items of ALL levels are
reserved before anything is trained: otherwise a question trained on at one level could be evaluated at the next.

A depth probe goes up when it solves the items with the most steps of its level (`is_new`). All items of a level of many
steps would mostly be items of the levels below, and pass the threshold by themselves.

A task begins at its first level of at least `ENOUGH` distinct questions. chain_sum's first level has 200, half of them
held out; a model learns the rest by heart, and the held-out rate never rises. Where making items is slow, a level is
drawn for `curriculum_draw_s` seconds alone; its questions are as many as training will meet, unless they repeat.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from addon.draws import DrawProgress, Draws
from engine.intervals import wilson
from engine.records import normalise
from engine.report import metric_row
from reasoning_gym_wrapper import EVAL_SEED, Example, Reserve, Task, TaskError, registry

AnyAnswer = TypeVar("AnyAnswer")  # has the `example` that it answers
Fits = Callable[[list[Example]], list[Example]]

ENOUGH = 1000  # distinct questions: with a few hundred, training repeats them within minutes and learns nothing else
FEWEST = 8  # questions that a level must give in its time


@dataclass(frozen=True)
class CurriculumConfig:
    """How tasks climb; each field is the flag of its name.

    curriculum_threshold: held-out solved rate at which a task goes up a level, above 0 and at most 1.
    curriculum_levels: highest level; 0 = the task's last.
    eval_n: evaluation items of each task and level.
    eval_seed: seed that they are drawn with.
    group_split: evaluate a task of few solutions on solutions that are never trained on, see `Reserve`.
    curriculum_draw_s: seconds that drawing the questions of one level may take; 0 = no limit.
    """

    curriculum_threshold: float = 0.8
    curriculum_levels: int = 0
    eval_n: int = 256
    eval_seed: int = EVAL_SEED
    group_split: bool = True
    curriculum_draw_s: float = 60.0


def curriculum_problems(names: Sequence[str]) -> list[str]:
    """One line where some of the tasks have no curriculum; an empty list when all have one."""
    names = [name for name in names if not hasattr(registry().get(name, (None, None))[1], "levels")]
    if not names:
        return []
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
    own = getattr(task.scorer.config, "levels", None)
    if own is not None:
        configs = [task.config | fields for fields in own()]
        return configs[: highest + 1] if highest else configs

    from reasoning_gym.factory import create_curriculum

    curriculum = create_curriculum(task.name)
    attributes = list(curriculum.attributes.values())

    # The fields of the task's config that the curriculum sets: one per attribute, or both ends of a range.
    fields = []
    for attribute in attributes:
        for kind in ("lower_field_name", "upper_field_name", "field_name"):
            if hasattr(attribute, kind):
                fields.append(getattr(attribute, kind))

    last = max((len(attribute.levels) for attribute in attributes), default=1) - 1
    if highest:
        last = min(highest, last)
    configs: list[dict[str, Any]] = []
    for level in range(last + 1):
        curriculum.set_global_level(level)
        made = curriculum.generate_configuration(dict(task.config))
        config = task.config | {name: getattr(made, name) for name in fields}
        if not configs or config != configs[-1]:
            configs.append(config)
    return configs


def ladder(task: Task, highest: int = 0) -> list[Task]:
    """The task at each of its levels, up to the first that its own configuration refuses.

    Raises:
        TaskError: it refuses the first level.
    """
    steps: list[Task] = []
    for config in level_configs(task, highest):
        try:
            steps.append(Task(task.name, config, task.limits))
        except TaskError:
            if not steps:
                raise
            break
    return steps


def all_fit(examples: list[Example]) -> list[Example]:
    """The `fits` of a curriculum without a limit of length."""
    return examples


@dataclass(frozen=True)
class Level:
    """What was drawn of one level: distinct questions, whether time ended that, and how many draws were no new one."""

    questions: list[Example]
    ran_out: bool
    repeated: int

    @property
    def is_endless(self) -> bool:
        """Whether it is slow and does not repeat itself: training will meet no more questions than were drawn here."""
        return self.ran_out and self.repeated <= len(self.questions)


def silent(line: str) -> None:
    """The `say` of a curriculum that nobody listens to."""


class Curriculum:
    """Where each task stands, and the evaluation items of every level.

    `starts` has the level each task begins at: the first of `ENOUGH` questions, or 0 where none has as many. `eval_n`
    items are evaluated at a level, or half of its distinct questions where it has fewer than twice as many. `fits`
    leaves out items that are too long and raises ValueError where it may not; the ladder ends below such a level, and
    below one that gives fewer than `FEWEST` questions in its time. `draws` records what the clock decided, or repeats
    what it did before. `say` takes a line about each level that is slow. Questions in `trained` are not evaluated.

    Raises:
        TaskError, ValueError: the first level of a task cannot be used.
    """

    def __init__(
        self,
        tasks: Sequence[Task],
        config: CurriculumConfig,
        fits: Fits = all_fit,
        draws: Draws | None = None,
        say: Callable[[str], None] = silent,
        trained: Container[str] = (),
    ):
        self.config = config
        self.trained = trained
        self.draws = draws or Draws()
        self.say = say
        self.ladders: dict[str, list[Task]] = {}
        self.held_out: dict[str, list[list[Example]]] = {}  # task -> level -> items
        self.starts: dict[str, int] = {}
        self.reserve = Reserve([], 0, by_group=config.group_split)
        for task in tasks:
            self._climb(task, fits)
            self.reserve.examples += [example for level in self.held_out[task.name] for example in level]
        self.reserve.questions = {normalise(example.question) for example in self.reserve.examples}
        self.levels = dict(self.starts)

    def _climb(self, task: Task, fits: Fits) -> None:
        """Finds the task's levels, the items of each, and where it begins."""
        self._was_timed = False
        steps: list[Task] = []
        items: list[list[Example]] = []
        drawn: list[list[int]] = []
        known = self.draws.levels.get(task.name)
        for step in ladder(task, self.config.curriculum_levels)[: len(known) if known else None]:
            # What cannot be used ends the ladder; below the first level there is nothing to stand on.
            try:
                level = self._draw(step, len(steps))
                fitting = fits(level.questions[: 2 * self.config.eval_n])
            except ValueError as error:
                if not steps:
                    raise
                if isinstance(error, TaskError):
                    self.say(f"curriculum ends at level {len(steps) - 1} of {task.name}: {error}")
                break

            # A slow level is none to begin at where a lower one gives more.
            most = max((count for count, _ in drawn), default=0)
            if len(level.questions) >= ENOUGH or (level.is_endless and len(level.questions) >= most):
                self.starts.setdefault(task.name, len(steps))
            drawn.append([len(level.questions), int(level.ran_out)])
            steps.append(step)
            items.append(fitting[: self._evaluated(level, len(fitting))])

        self.ladders[task.name] = steps
        self.held_out[task.name] = items
        self.starts.setdefault(task.name, 0)
        if self._was_timed:
            self.draws.levels[task.name] = drawn

    def _draw(self, step: Task, level: int) -> Level:
        """The distinct questions of one level. Raises TaskError where it gives none, or too few in its time."""
        # Once the start is known, no level's questions are counted beyond what is needed.
        config = self.config
        wanted = 2 * config.eval_n
        if step.name not in self.starts:
            wanted = max(wanted, ENOUGH)

        # Questions that were drawn before are drawn again by their number, not by the clock.
        seconds = config.curriculum_draw_s
        ran_out = False
        if self.draws.repeats:
            seconds = 0.0
            if step.name in self.draws.levels:
                wanted, ran_out = self.draws.levels[step.name][level]

        tell = DrawProgress(f"curriculum: drawing {{task}} level {level}", wanted, self.say)
        with self.draws.clock([step]):
            reserve = Reserve(
                [step], wanted, config.eval_seed, must_fill=False, by_group=config.group_split, seconds=seconds,
                tell=tell, trained=self.trained,
            )
        count = len(reserve.examples)
        passed = reserve.passed_over.get(step.name, 0)
        if passed:
            self.reserve.passed_over[step.name] = self.reserve.passed_over.get(step.name, 0) + passed
        self._was_timed |= reserve.ran_out or bool(ran_out)
        if reserve.ran_out and count < FEWEST:
            raise TaskError(
                f"task {step.name}: level {level} gave {count} items in {seconds:g} s, {FEWEST} are needed: raise "
                "--curriculum_draw_s, lower the difficulty with --task_config or choose another task"
            )
        if reserve.ran_out:
            self.say(
                f"curriculum: {step.name} level {level} gave {count} of {wanted} items in {seconds:g} s and is used "
                "with these (--curriculum_draw_s)"
            )
        return Level(reserve.examples, bool(ran_out) or reserve.ran_out, reserve.repeated)

    def _evaluated(self, level: Level, fitting: int) -> int:
        """How many of a level's fitting questions are evaluated; where they are few, half stay for training."""
        if level.is_endless:
            return min(self.config.eval_n, fitting)
        return min(self.config.eval_n, max(fitting // 2, 1))

    def tasks(self) -> list[Task]:
        """Each task at its level."""
        return [self.ladders[name][level] for name, level in self.levels.items()]

    def examples(self) -> list[Example]:
        """The evaluation items of the levels of now."""
        return [example for name, level in self.levels.items() for example in self.held_out[name][level]]

    def judged(self, name: str, answers: Sequence[AnyAnswer]) -> list[AnyAnswer]:
        """The answers to a task's items that decide whether it goes up: those its level adds, where it knows them."""
        is_new = getattr(self.ladders[name][self.levels[name]].scorer.config, "is_new", None)
        if is_new is None:
            return list(answers)
        added = [answer for answer in answers if is_new(answer.example.entry["metadata"])]
        return added or list(answers)

    def update(self, rates: Mapping[str, float]) -> list[str]:
        """Raises by one level each task whose solved rate reaches the threshold; returns those tasks."""
        raised = []
        for name, level in self.levels.items():
            is_last = level + 1 == len(self.ladders[name])
            if rates[name] >= self.config.curriculum_threshold and not is_last:
                raised.append(name)

        for name in raised:
            self.levels[name] += 1
        return raised

    def restore(self, levels: Mapping[str, int]) -> None:
        """The levels of a checkpoint; a task that it does not name keeps its own."""
        for name, level in self.levels.items():
            saved = int(levels.get(name, level))
            self.levels[name] = min(saved, len(self.ladders[name]) - 1)

    def rows(self) -> list[dict[str, Any]]:
        """CSV rows: the level that each task is evaluated at."""
        rows = []
        for name, level in self.levels.items():
            rows.append(metric_row(name, "curriculum_level", level, len(self.held_out[name][level])))
        return rows

    def added_rows(self, answers_of: Callable[[str], Sequence[Any]]) -> list[dict[str, Any]]:
        """CSV rows: solved of the items that decide whether a task goes up, where these are not all of its items."""
        rows = []
        for name in self.levels:
            answers = answers_of(name)
            added = self.judged(name, answers)
            if len(added) < len(answers):
                solved = sum(answer.solved for answer in added)
                interval = wilson(solved, len(added))
                rows.append(metric_row(name, "solved_added", solved / len(added), len(added), interval=interval))
        return rows

    def summary(self) -> str:
        """`chain_sum 2 of 10, gcd 0 of 4`"""
        parts = [f"{name} {level} of {len(self.ladders[name]) - 1}" for name, level in self.levels.items()]
        return ", ".join(parts)
