"""Training items without end or by epochs, none of them reserved for evaluation, exactly resumable."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

from reasoning_gym_wrapper import MAX_REJECTED, Example, Reserve, Task, TaskError

SEED_GAP = 10**7  # between the data seeds of two runs; a run draws fewer items of a task


def train_seed(seed: int) -> int:
    """The data seed of training run `seed`: below 890,000,000, so far below every evaluation seed.

    The first 89 runs lie SEED_GAP apart; later ones lie between them, as the data seeds that all tasks take run out.
    """
    lap, slot = divmod(seed, 89)
    return slot * SEED_GAP + lap * 100_003 % SEED_GAP


class TrainStream:
    """Endless training items, balanced to within one example per task, none of them in the reserve.

    The position is a small JSON-able state, so that a resumed run sees exactly the items an uninterrupted one would.

    Raises:
        TaskError: a task has no gold answer, or (nearly) all of its questions are reserved for evaluation.
    """

    def __init__(self, tasks: Sequence[Task], reserve: Reserve, seed: int):
        self.tasks, self.reserve, self.seed = list(tasks), reserve, seed
        self._next = [0] * len(self.tasks)
        self._turn = 0
        self._open()

    def _open(self) -> None:
        pairs = zip(self.tasks, self._next, strict=True)
        self._items = [task.items(self.seed, start) for task, start in pairs]

    def __iter__(self) -> TrainStream:
        return self

    def __next__(self) -> Example:
        turn = self._turn
        for _ in range(MAX_REJECTED):
            index, example = next(self._items[turn])
            self._next[turn] = index + 1
            if example.target is None:
                raise TaskError(f"task {example.task} has an item without a gold answer: it cannot be trained on")
            if not self.reserve.rejects(example):
                self._turn = (turn + 1) % len(self.tasks)
                return example
        raise TaskError(
            f"task {self.tasks[turn].name}: {MAX_REJECTED} draws in a row were evaluation questions, nothing is left "
            "to train on: lower --eval_n or raise the difficulty with --task_config"
        )

    def state_dict(self) -> dict[str, Any]:
        return {"next": list(self._next), "turn": self._turn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._next, self._turn = list(state["next"]), int(state["turn"])
        self._open()


class EpochStream:
    """A fixed training set of `n` items, in a new order every epoch (a function of seed and epoch alone)."""

    def __init__(self, examples: Sequence[Example], seed: int):
        self.examples, self.seed = list(examples), seed
        self.drawn = 0
        self._order: tuple[int, list[int]] = (-1, [])

    def __iter__(self) -> EpochStream:
        return self

    def __next__(self) -> Example:
        epoch, place = divmod(self.drawn, len(self.examples))
        if self._order[0] != epoch:
            order = list(range(len(self.examples)))
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
            self._order = (epoch, order)
        self.drawn += 1
        return self.examples[self._order[1][place]]

    def state_dict(self) -> dict[str, Any]:
        return {"drawn": self.drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.drawn = int(state["drawn"])


def training_examples(tasks: Sequence[Task], reserve: Reserve, seed: int, n: int) -> TrainStream | EpochStream:
    """`--train_n`: a fixed set of n items, or with 0 fresh items without end; both reject the reserve's questions."""
    stream = TrainStream(tasks, reserve, train_seed(seed))
    if n == 0:
        return stream
    return EpochStream([next(stream) for _ in range(n)], seed)
