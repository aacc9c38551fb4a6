"""Own data that are too large to be held: read from the first row to the last, epoch by epoch, as a stream."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

from engine.records import normalise
from own_tasks.source import rows_of
from own_tasks.table import Item, OwnDataConfig, usable
from own_tasks.task import OwnTask, rank
from reasoning_gym_wrapper import EVAL_SEED, Example
from tasks.limits import USUAL, JudgeConfig

PROBED = 1000  # rows that are looked at before anything loads
BUFFER = 10_000  # rows among which the next one is drawn
EVAL_SHARE = 50  # one question in so many is for evaluation alone


class StreamedTask(OwnTask):
    """Own data as a task whose rows are never all in memory.

    A hash of the normalised question decides whether it is for evaluation alone (one in `EVAL_SHARE`) or for training,
    unless --eval_data are given: so what is held out depends on no other row. Training rows come in the order of the
    source, shuffled by a buffer. Rows that cannot be used are passed over, and named among the first `PROBED`.

    Raises:
        TaskError: as `OwnTask`; no row among the first `PROBED` can be used.
    """

    is_fixed = False

    def __init__(self, config: OwnDataConfig, limits: JudgeConfig = USUAL):
        super().__init__(config, limits, most=PROBED)

    def problems(self, eval_n: int, trains: bool) -> list[str]:
        """One line where --eval_data have too few rows; those of the stream are not counted."""
        if self.eval_table is None:
            return []
        return super().problems(eval_n, trains=False)

    def notes(self) -> list[str]:
        """As of `OwnTask`, of the rows that were looked at, and how the others are read."""
        lines = self.name_notes()
        for table in self.tables:
            lines += table.notes()

        held_out = f"; one question in {EVAL_SHARE} is kept for evaluation alone"
        if self.eval_table:
            held_out = ""
        return [*lines, f"{self.table.source.shown} is large and read as a stream: of rows behind the first {PROBED:,} "
                f"those that cannot be used are passed over, and repeated ones are not counted{held_out}"]

    def items(self, seed: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        """Endless (index, Example) pairs from index `start`; the same seed and index give the same item."""
        index = 0
        for epoch in itertools.count():
            # A position is found by reading up to it: rows may be of any length.
            for item in self._epoch(seed, epoch):
                if index >= start:
                    yield index, self.example(item, index)
                index += 1

    def _epoch(self, seed: int, epoch: int) -> Iterator[Item]:
        """The rows of one pass."""
        if seed < EVAL_SEED:
            return shuffled(self._training_rows(), random.Random(f"{seed}/{epoch}"))

        # Rows to evaluate on: those of a file of their own, or those that training passes over.
        if self.eval_table:
            return iter(self._order(seed, epoch))
        return (item for item in self._rows() if for_evaluation(item))

    def _training_rows(self) -> Iterator[Item]:
        """Rows whose question is not for evaluation."""
        for item in self._rows():
            if self.eval_table:
                held_out = normalise(item.question) in self.eval_table.questions
            else:
                held_out = for_evaluation(item)

            if not held_out:
                yield item

    def _rows(self) -> Iterator[Item]:
        """Every row that can be used. Raises ValueError where the source cannot be read."""
        for row in rows_of(self.table.source, self.own.fields):
            try:
                item = usable(row, self.own, self.scorer, self.limits.score_timeout_s, {})
            except ValueError:
                continue
            yield item._replace(place=f"{self.table.source.shown} {item.place}")


def for_evaluation(item: Item) -> bool:
    """Whether the question is one of those that are never trained on, whatever the seed."""
    return int.from_bytes(rank(item.question, EVAL_SEED)[:8]) % EVAL_SHARE == 0


def shuffled(items: Iterator[Item], draw: random.Random) -> Iterator[Item]:
    """The items in another order: each next one is drawn from the `BUFFER` that are read ahead."""
    buffer = list(itertools.islice(items, BUFFER))

    for item in items:
        place = draw.randrange(len(buffer))
        yield buffer[place]
        buffer[place] = item

    # The end of the source: what was read ahead.
    draw.shuffle(buffer)
    yield from buffer
