"""`OwnTask`: own data with the interface of `reasoning_gym_wrapper.Task`."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from engine.records import normalise
from own_tasks.source import Source, source_of
from own_tasks.table import Item, OwnDataConfig, Table, entry_of, table_of
from own_tasks.verifiers import verifier_of
from reasoning_gym_wrapper import EVAL_SEED, Example, TaskError, registry
from tasks.limits import USUAL, JudgeConfig


class OwnTask:
    """Own data as a task: endless items by (seed, index), and its verifier.

    Seeds of evaluation walk through the rows in the order of a hash of the normalised question, so that the first n
    rows held out are among the first n + 1, whatever the order of the file. Training seeds give all rows in a new order
    each epoch; the reserve rejects what is held out. With --eval_data the two walk through different rows, and no
    question of the one is in the other.

    Raises:
        TaskError: the data or the verifier cannot be used; one line.
    """

    is_fixed = True  # all rows are at hand

    def __init__(self, config: OwnDataConfig, limits: JudgeConfig = USUAL, most: int | None = None):
        self.own = config
        self.limits = limits
        self.passed_over: dict[int, list[int]] = {}  # items are at hand: none takes long to make
        self.left_out: set[int] = set()
        self.most_slow = 1
        try:
            self.scorer = verifier_of(config.verifier)
            self.table = table_of(source_of(config.data, "--data"), config, limits, most)
            self.eval_table: Table | None = None
            if config.eval_data:
                self.eval_table = table_of(source_of(config.eval_data, "--eval_data"), config, limits)
        except ValueError as error:
            raise TaskError(str(error)) from error

        self.name = task_name(self.table.source)
        if config.before and config.before[0] == self.table.digest:
            self.name = config.before[1]
        self.config = {"data": self.table.digest, "fields": list(config.fields)}  # what its draws are recorded under

        # Evaluation first: its questions are never trained on, drawn or not.
        self.eval_items = self.table.items
        self.train_items = self.table.items
        if self.eval_table:
            self.eval_items = self.eval_table.items
            asked = self.eval_table.questions
            self.train_items = [item for item in self.table.items if normalise(item.question) not in asked]

    @property
    def tables(self) -> list[Table]:
        """What was read, the training data first."""
        if self.eval_table is None:
            return [self.table]
        return [self.table, self.eval_table]

    def problems(self, eval_n: int, trains: bool) -> list[str]:
        """One line where there are too few rows for `eval_n` held-out items and, if it `trains`, one to train on."""
        shown = self.table.source.shown
        if trains and not self.train_items:
            return [f"--data {shown}: every question stands in --eval_data too, nothing is left to train on"]

        # Rows to evaluate on come from a file of their own, or one more must be left.
        rows = len(self.eval_items)
        if self.eval_table and rows < eval_n:
            return [f"--eval_data {self.eval_table.source.shown} has {rows} usable questions, --eval_n {eval_n} were "
                    f"asked for: lower --eval_n to {rows}"]
        if not self.eval_table and rows < eval_n + trains:
            return [f"--data {shown} has {rows} usable questions, too few to hold out --eval_n {eval_n} of them: lower "
                    f"--eval_n to {max(rows // 5, 1)}, or give --eval_data"]
        return []

    def notes(self) -> list[str]:
        """What a user should know before reading its figures, one line each."""
        lines = self.name_notes()
        for table in self.tables:
            lines += table.notes()

        taken = len(self.table.items) - len(self.train_items)
        if taken:
            shown = self.table.source.shown
            lines.append(f"{shown}: {taken} rows ask a question of --eval_data and are not trained on")
        return lines

    def name_notes(self) -> list[str]:
        """One line where the data keep the name that they had in the checkpoint."""
        if self.name == task_name(self.table.source):
            return []

        shown = self.table.source.shown
        return [f"{shown} has the bytes of the checkpoint's data: the task keeps the name {self.name}"]

    def items(self, seed: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        """Endless (index, Example) pairs from index `start`; the same seed and index give the same item."""
        epoch = -1
        rows: list[Item] = []
        index = start
        total = len(self._rows_of(seed))

        while True:
            # The order depends on seed and epoch alone, so that a position needs no history.
            if index // total != epoch:
                epoch = index // total
                rows = self._order(seed, epoch)

            yield index, self.example(rows[index % total], index)
            index += 1

    def example(self, item: Item, index: int = 0) -> Example:
        """The item as everything downstream knows it."""
        return Example(item.question, item.answer, self.name, entry_of(item, self.name, index), self)

    def _rows_of(self, seed: int) -> list[Item]:
        """The rows that a seed walks through: seeds of evaluation lie far above those of training."""
        if seed >= EVAL_SEED:
            return self.eval_items
        return self.train_items

    def _order(self, seed: int, epoch: int) -> list[Item]:
        """The rows of an epoch; those of evaluation always stand in one order, by hash."""
        rows = list(self._rows_of(seed))
        if seed >= EVAL_SEED:
            return sorted(rows, key=lambda item: rank(item.question, seed))

        # A new order each epoch.
        random.Random(f"{seed}/{epoch}").shuffle(rows)
        return rows

    def record(self) -> dict[str, Any]:
        """What a checkpoint keeps of the data: where it lies, what its bytes were, how it is read and judged."""
        sources = []
        for table in self.tables:
            sources.append({"flag": table.source.flag, "path": table.source.text, "sha256": table.digest,
                            "questions": len(table.items)})
        return {"task": self.name, "sources": sources, "fields": list(self.own.fields), "verifier": self.own.verifier}


def rank(question: str, seed: int) -> bytes:
    """The place of a question among those of evaluation: a hash of its normalised text."""
    return hashlib.sha256(f"{seed}/{normalise(question)}".encode()).digest()


def name_of_data(text: str) -> str:
    """The name of the task that --data becomes, also where the data are elsewhere."""
    try:
        return task_name(source_of(text, "--data"))
    except ValueError:
        return Path(text.partition(":")[0]).name.partition(".")[0]


def task_name(source: Source) -> str:
    """The name of the task that a source becomes; one of Reasoning Gym's is not taken from it."""
    if source.name in registry():
        return f"own_{source.name}"
    return source.name
