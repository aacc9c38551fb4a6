"""Training items, one after another: without end, or a fixed set in epochs. None of them is evaluated."""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence
from typing import Any

from own_tasks.task import OwnTask
from reasoning_gym_wrapper import GROUPS, MAX_REJECTED, Example, Reserve, Task, TaskError, train_seed


def most_owed(weights: Sequence[float], taken: Sequence[int]) -> int:
    """The task that lags furthest behind its share, given how many items of each were taken; the first of several."""
    # What each share would be after one more item, less what it is.
    total = sum(taken) + 1
    whole = sum(weights)
    owed = []
    for weight, count in zip(weights, taken, strict=True):
        owed.append(weight / whole * total - count)
    return owed.index(max(owed))


class TrainStream:
    """Endless training items, none of them in the reserve.

    Tasks take turns, so that every prefix is balanced to within one example per task. With `weights` (one number above
    0 for each task) the next item is of the task that lags furthest behind its share.

    The position is a small JSON-able state, so that a resumed run sees exactly the items an uninterrupted one would.

    Raises:
        TaskError: a task has no gold answer, or (nearly) all of its questions are reserved for evaluation.
    """

    def __init__(self, tasks: Sequence[Task], reserve: Reserve, seed: int, weights: Sequence[float] | None = None):
        self.tasks = list(tasks)
        self.reserve = reserve
        self.seed = seed
        self.weights = weights
        self._next = [0] * len(self.tasks)  # index of each task's next item
        self._taken = [0] * len(self.tasks)  # items of each task so far, counted where there are weights
        self._turn = self._turn_after(-1)  # index of the task whose turn it is
        self._open()

    def _open(self) -> None:
        pairs = zip(self.tasks, self._next, strict=True)
        self._items = [task.items(self.seed, start) for task, start in pairs]

    def _turn_after(self, turn: int) -> int:
        """The task whose turn comes after that of `turn`."""
        if self.weights is None:
            return (turn + 1) % len(self.tasks)

        return most_owed(self.weights, self._taken)

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Example:
        turn = self._turn
        for _ in range(MAX_REJECTED):
            index, example = next(self._items[turn])
            self._next[turn] = index + 1

            # Reserved questions are passed over: evaluation must never meet an item that was trained on.
            if example.target is None:
                raise TaskError(f"task {example.task} has an item without a gold answer: it cannot be trained on")
            if not self.reserve.rejects(example):
                self._taken[turn] += 1
                self._turn = self._turn_after(turn)
                return example
        raise TaskError(
            f"task {self.tasks[turn].name}: {MAX_REJECTED} draws in a row were evaluation questions, nothing is left "
            "to train on: lower --eval_n or raise the difficulty with --task_config"
        )

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        state: dict[str, Any] = {"next": list(self._next), "turn": self._turn}
        if self.weights is not None:
            state["taken"] = list(self._taken)
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` returned."""
        self._next = list(state["next"])
        self._taken = list(state.get("taken", self._taken))
        self._turn = int(state["turn"])
        self._open()


class EpochStream:
    """A fixed training set of `n` items, in a new order every epoch (a function of seed and epoch alone)."""

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples = list(examples)
        self.seed = seed
        self.drawn = 0  # items handed out since the beginning
        self._order: tuple[int, list[int]] = (-1, [])  # an epoch and its order of items

    def __iter__(self) -> EpochStream:
        return self

    def __next__(self) -> Example:
        epoch, place = divmod(self.drawn, len(self.examples))

        # The order depends on seed and epoch alone, so a resumed run needs no history.
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        self.drawn += 1
        return self.examples[self._order[1][place]]

    def state_dict(self) -> dict[str, Any]:
        """The position, JSON-able."""
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state_dict` returned."""
        self.drawn = int(state["drawn"])


def training_examples(
    tasks: Sequence[Task], reserve: Reserve, seed: int, n: int, weights: Sequence[float] | None = None
) -> TrainStream | EpochStream:
    """`--train_n`: a fixed set of n items, or with 0 fresh items without end; both reject the reserve's questions.

    Own data alone are a fixed set by themselves: all rows that are not held out, or n of them.
    """
    if len(tasks) == 1 and isinstance(tasks[0], OwnTask) and tasks[0].is_fixed:
        return EpochStream(_own_rows(tasks[0], reserve, seed, n), seed)
    stream = TrainStream(tasks, reserve, train_seed(seed), weights)
    if n == 0:
        return stream
    return EpochStream([next(stream) for _ in range(n)], seed)


def _own_rows(task: OwnTask, reserve: Reserve, seed: int, n: int) -> list[Example]:
    """The rows to train on, in the order of the seed; the first `n`, or with 0 all. Raises TaskError where none is."""
    rows = []
    for _, example in itertools.islice(task.items(train_seed(seed)), len(task.train_items)):
        if not reserve.rejects(example):
            rows.append(example)
    if not rows:
        raise TaskError(f"task {task.name}: every question is held out, nothing is left to train on: lower --eval_n")
    return rows[: n or len(rows)]


def beyond_reserve(names: Sequence[str], reserved: int, by_group: bool) -> list[str]:
    """What to know of items beyond the `reserved` first that a run of these tasks drew before it trained.

    It is for checkpoints that do not record what they were trained on. Nothing where whole groups of each task were
    kept for evaluation, see `Reserve`.
    """
    if by_group and all(name in GROUPS for name in names):
        return []
    return [f"WARNING: training kept off the first {reserved} evaluation items of each task: others evaluated now may "
            "have been trained on"]
