"""What the clock decided when items were drawn: kept with a checkpoint, so that a run that goes on draws the same."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

from accelerate.utils import gather_object

from engine.machine import Machine
from engine.progress import clock_text
from engine.state import peek
from engine.system import LoopConfig
from flags import FIND
from reasoning_gym_wrapper import Task
from text_data.trained import TrainedQuestions, trained_by

Drawn = TypeVar("Drawn")

QUIET_S = 15.0  # seconds of drawing before the first line about it, and from one line to the next
DECIDES = (
    *("task", "tasks", "task_config", "eval_n", "eval_seed", "group_split", "curriculum", "curriculum_levels"),
    *("data", "question_field", "answer_field", "messages_field", "eval_data", "verifier"),
)


@dataclass
class Draws:
    """The record of a run's draws, JSON-able by `document`.

    passed_over: task and difficulty -> seed -> indices of the items that took too long to make.
    levels: task of a curriculum -> [distinct questions, whether time ran out] of each level, where a clock limited any.
    repeats: True where the items were drawn before: then no clock decides anything.
    """

    passed_over: dict[str, dict[str, list[int]]] = field(default_factory=dict)
    levels: dict[str, list[list[int]]] = field(default_factory=dict)
    repeats: bool = False

    @classmethod
    def of(cls, document: Mapping[str, Any], repeats: bool) -> Draws:
        """The record that a checkpoint holds; without `repeats` only the items that were passed over are taken."""
        levels = dict(document.get("levels", {})) if repeats else {}
        return cls(dict(document.get("passed_over", {})), levels, repeats)

    def document(self) -> dict[str, Any]:
        """What a checkpoint keeps; empty where no clock decided anything."""
        parts = {"passed_over": self.passed_over, "levels": self.levels}
        return {name: part for name, part in parts.items() if part}

    def prepare(self, task: Task) -> None:
        """Tells a task what it passed over before."""
        known = self.passed_over.get(_key(task), {})
        task.passed_over |= {int(seed): list(indices) for seed, indices in known.items()}

    def note(self, tasks: Sequence[Task]) -> None:
        """Takes down what these tasks have passed over by now."""
        for task in tasks:
            if task.passed_over:
                self.passed_over[_key(task)] = {str(seed): indices for seed, indices in task.passed_over.items()}

    @contextlib.contextmanager
    def clock(self, tasks: Sequence[Task]) -> Iterator[None]:
        """Inside, the tasks draw evaluation items: by the record alone where they were drawn before."""
        for task in tasks:
            self.prepare(task)
        limits = [task.limits for task in tasks]
        if self.repeats:
            for task in tasks:
                task.limits = dataclasses.replace(task.limits, draw_timeout_s=0.0)
        try:
            yield
        finally:
            for task, own in zip(tasks, limits, strict=True):
                task.limits = own
            self.note(tasks)


def draws_of(checkpoint: Path | None, config: LoopConfig) -> Draws:
    """The record that a run goes on with: its checkpoint's, or an empty one for a new run."""
    if checkpoint is None or config.reset_progress:
        return Draws()
    extra, _ = peek(checkpoint)
    return Draws.of(extra.get("draws", {}), repeats=same_items(checkpoint, config))


def same_items(checkpoint: Path | None, config: LoopConfig) -> bool:
    """Whether the run goes on with its checkpoint's evaluation items: others were not drawn before."""
    if checkpoint is None or config.reset_progress:
        return False
    flags = peek(checkpoint)[1]
    return bool(flags) and all(config.flags[name] == flags.get(name, FIND[name].default) for name in DECIDES)


def trained_of(checkpoint: Path | None, config: LoopConfig) -> TrainedQuestions:
    """What the run that goes on from a checkpoint must know of its training. Raises ValueError for a broken one."""
    return trained_by(checkpoint, same_items(checkpoint, config))


def _key(task: Task) -> str:
    return f"{task.name} {json.dumps(task.config, sort_keys=True, default=str)}"


def agreed(hold_out: Callable[[], None], machine: Machine, data: Any) -> None:
    """Calls `hold_out`, which draws by `data.draws`, so that every process draws the same items.

    Each has a clock of its own: the first one's decides, and the others repeat what it recorded.
    """
    if machine.world == 1 or data.draws.repeats:
        hold_out()
        return

    # The others must hear of the first one's failure as well, or they would wait for it.
    failure = None
    if machine.is_main:
        try:
            hold_out()
        except ValueError as error:
            failure = error
    [(document, message), *_] = gather_object([(data.draws.document(), str(failure or ""))])
    if failure:
        raise failure
    if message:
        raise ValueError(message)
    if not machine.is_main:
        data.draws = Draws.of(document, repeats=True)
        hold_out()
    data.draws.repeats = False


def drawn_alike(
    draw: Callable[[], Drawn], tasks: Sequence[Task], machine: Machine, draws: Draws | None = None
) -> Drawn:
    """What `draw()` returns, which draws items of `tasks`: the same in every process, whatever their clocks say.

    `draws` is what is known of earlier draws.
    """
    holder = SimpleNamespace(draws=draws or Draws())
    found: list[Drawn] = []

    def draw_once() -> None:
        with holder.draws.clock(tasks):
            found.append(draw())

    agreed(draw_once, machine, holder)
    return found[-1]


class DrawProgress:
    """Says how far the drawing of items is, where it takes long.

    what: is drawn, in words; `{task}` stands for the task's name.
    total: items of a task.
    say: takes a line.
    """

    def __init__(self, what: str, total: int, say: Callable[[str], None]):
        self.what = what
        self.total = total
        self.say = say
        self._began = time.monotonic()
        self._said = self._began
        self._task = ""

    def __call__(self, task: str, done: int) -> None:
        """`done` items of `task` are there."""
        now = time.monotonic()
        if task != self._task:
            self._task = task
            self._began = now
        if now - self._said < QUIET_S or done >= self.total:
            return
        self._said = now
        each = max(now - self._began, 1e-9) / max(done, 1)
        left = clock_text(each * (self.total - done))
        self.say(f"{self.what.format(task=task)}: {done} of {self.total} items, {each:.2g} s each, {left} left")
