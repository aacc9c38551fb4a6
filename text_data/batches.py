"""Batches of token triples: padding, and an endless stream that resumes exactly and that ranks share.

Shapes: B batch, E encoder tokens, T decoder tokens.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.batches import IGNORE
from text_data.order import EpochOrder
from text_data.triples import PreparedData, Triple

# The streams of random numbers that one seed gives: the order of an epoch, the order of the batches in a window.
EPOCH_ORDER, WINDOW_ORDER = 0, 1


def pad_batch(triples: Sequence[Triple], pad_id: int) -> dict[str, Tensor]:
    """Right-padded int64 tensors: encoder_ids, encoder_mask (B, E); decoder_input_ids, labels, decoder_mask (B, T).

    Masks are 1 at tokens and 0 at pads; labels are IGNORE (-100) at pads.
    """
    encoder_rows, decoder_rows, label_rows = zip(*triples, strict=True)
    encoder_ids, encoder_mask = _pad(encoder_rows, pad_id)
    decoder_ids, decoder_mask = _pad(decoder_rows, pad_id)
    labels, _ = _pad(label_rows, IGNORE)

    return {
        "encoder_ids": encoder_ids,
        "decoder_input_ids": decoder_ids,
        "labels": labels,
        "encoder_mask": encoder_mask,
        "decoder_mask": decoder_mask,
    }


def _pad(rows: Sequence[Sequence[int]], value: int) -> tuple[Tensor, Tensor]:
    """(ids, mask), both (rows, longest row) int64."""
    ids = np.full((len(rows), max(map(len, rows))), value, dtype=np.int64)
    mask = np.zeros_like(ids)

    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return torch.from_numpy(ids), torch.from_numpy(mask)


class PreparedBatches:
    """Endless batches of `size` triples per rank, from a PreparedData or a list of Triples, reshuffled every epoch.

    The order is a function of `seed` and the epoch alone. Epochs are joined end to end, so every batch is full. Every
    rank draws the same order and takes its share. Resuming from `state_dict()` gives exactly the batches that an
    uninterrupted run would see. Batches of another size, or of another number of ranks, go on with the triples that
    were in no batch yet: none is left out, none comes twice.

    Args:
        data: the triples.
        size: triples of one batch, on one rank.
        seed: of the order, at least 0.
        pad_id: token that fills up shorter rows.
        rank: this process, from 0.
        world: number of processes.
        workers: threads that read ahead; they do not change the order. 0: none.
        bucket: batches of one window. A window is drawn as one, sorted by length, cut into batches and put in random
            order, so that little is spent on padding. 1: no sorting.

    Raises:
        ValueError: no data, numbers out of range; from `next`, what reading raises.
    """

    def __init__(
        self,
        data: PreparedData | Sequence[Triple],
        size: int,
        seed: int,
        pad_id: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        bucket: int = 1,
    ):
        self.data = data
        self.size = size
        self.seed = seed
        self.pad_id = pad_id
        self.rank = rank
        self.world = world
        self.workers = workers
        self.bucket = bucket
        problems = self._problems()
        if problems:
            raise ValueError("; ".join(problems))

        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="prepared") if workers else None
        self._order = EpochOrder(len(data), [seed, EPOCH_ORDER])
        self._ahead: deque[Future[list[dict[str, Tensor]]]] = deque()  # windows that threads are reading
        self._given = 0  # batches handed out, in the cut of now
        self._head: list[int] = []  # items that batches of another cut left over; they come first
        self._base = 0  # where the epochs go on behind them
        self._rewind()

    def _problems(self) -> list[str]:
        """What is wrong with the arguments, one phrase each."""
        least = {"size": 1, "world": 1, "bucket": 1, "workers": 0, "seed": 0, "rank": 0}
        problems = []
        for name, low in least.items():
            value = getattr(self, name)
            if value < low:
                problems.append(f"{name} is {value}, expected at least {low}")

        if self.rank >= self.world >= 1:
            problems.append(f"rank {self.rank} is not below world {self.world}")
        if not len(self.data):
            problems.append("there is no data")
        return problems

    def _rewind(self) -> None:
        """Drops what was read ahead and plans anew from the batches handed out."""
        while self._ahead:
            self._ahead.popleft().cancel()

        self._planned = self._given // self.bucket  # the next window to draw
        self._window: list[dict[str, Tensor]] = []

    @property
    def epoch(self) -> int:
        """Whole passes over the data, by all ranks together, in the batches handed out."""
        return (self._base - len(self._head) + self._given * self.size * self.world) // len(self.data)

    def state_dict(self) -> dict[str, Any]:
        """The position, and what it depends on; JSON can hold it. The same on every rank."""
        state: dict[str, Any] = {
            "given": self._given,
            "seed": self.seed,
            "size": self.size,
            "world": self.world,
            "bucket": self.bucket,
            "length": len(self.data),
        }
        if self._base:
            state |= {"head": self._head, "base": self._base}
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on where the state was taken.

        Raises:
            ValueError: the state belongs to other data, or is broken.
        """
        here = self.state_dict()
        changed = []
        for key in ("seed", "length"):
            if state.get(key) != here[key]:
                changed.append(f"{key} was {state.get(key)} and is {here[key]}")
        if changed:
            raise ValueError(
                f"the saved position belongs to other batches ({', '.join(changed)}): "
                "resume with the same data and options"
            )

        self._given = int(state["given"])
        self._head = list(state.get("head", []))
        self._base = int(state.get("base", 0))

        # Batches of another cut go on behind the last item that was handed out.
        step = state["size"] * state["world"]
        if (step, state["bucket"]) != (self.size * self.world, self.bucket):
            self._go_on_behind(step, state["bucket"])
        self._rewind()

    def _go_on_behind(self, step: int, bucket: int) -> None:
        """From a position in batches of `step` items, `bucket` a window, to that place in batches of the cut of now."""
        window, place = divmod(self._given, bucket)
        end = window * bucket * step

        # Of a window that was begun, the batches not handed out are left.
        left: list[int] = []
        if place:
            indices = self._stretch(end, bucket * step)
            end += bucket * step
            left = [index for batch in self._batches(window, indices, step)[place:] for index, _ in batch]

        self._base += max(end - len(self._head), 0)
        self._head = left + self._head[end:]
        self._given = 0

    def __iter__(self) -> PreparedBatches:
        return self

    def __next__(self) -> dict[str, Tensor]:
        if not self._window:
            self._window = self._next_window()
            self._window = self._window[self._given % self.bucket :]  # not 0 after a resume inside a window

        batch = self._window.pop(0)
        self._given += 1
        return batch

    def _next_window(self) -> list[dict[str, Tensor]]:
        """This rank's batches of the next window, read now or taken from the threads."""
        if self._pool is None:
            self._planned += 1
            return self._load(self._planned - 1, self._indices(self._planned - 1))

        # Which triples a window holds is decided here, in order; the threads only read them.
        while len(self._ahead) <= self.workers:
            indices = self._indices(self._planned)
            self._ahead.append(self._pool.submit(self._load, self._planned, indices))
            self._planned += 1
        return self._ahead.popleft().result()

    def _indices(self, window: int) -> list[int]:
        """The items of window `window`: the next bucket * size * world of all epochs joined end to end."""
        count = self.bucket * self.size * self.world
        return self._stretch(window * count, count)

    def _stretch(self, start: int, count: int) -> list[int]:
        """The items at the places `start` to `start + count` of what was left over and the epochs behind it."""
        left = self._head[start : start + count]

        behind = self._base + max(start - len(self._head), 0)
        return left + self._order.stretch(behind, count - len(left)).tolist()

    def _load(self, window: int, indices: list[int]) -> list[dict[str, Tensor]]:
        """This rank's padded batches of one window."""
        if self.bucket == 1:
            share = [self.data[index] for index in indices[self.rank :: self.world]]
            return [pad_batch(share, self.pad_id)]

        # Every rank sorts the whole window alike, so that the ranks' batches of a step are of similar length.
        padded = []
        for batch in self._batches(window, indices, self.size * self.world):
            share = [triple for _, triple in batch[self.rank :: self.world]]
            padded.append(pad_batch(share, self.pad_id))
        return padded

    def _batches(self, window: int, indices: list[int], step: int) -> list[list[tuple[int, Triple]]]:
        """The window's items with their triples, `step` of similar length in each batch, in the batches' order."""
        items = sorted(((index, self.data[index]) for index in indices), key=lambda item: _length(item[1]))
        batches = [items[start : start + step] for start in range(0, len(items), step)]

        # Batches from short to long would make each window a sweep of lengths.
        order = np.random.default_rng([self.seed, WINDOW_ORDER, window]).permutation(len(batches))
        return [batches[number] for number in order]


def _length(triple: Triple) -> int:
    """Tokens that both sides read."""
    return len(triple.encoder_ids) + len(triple.decoder_input_ids)
