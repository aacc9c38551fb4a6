"""What all batches share: the label that is ignored, what counts as right, work on items of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from engine.labels import IGNORE
from engine.stopping import stop_point

MOST_PADDING = 0.1  # share of a token batch

Item = TypeVar("Item")
Result = TypeVar("Result")


def by_length(
    items: Sequence[Item],
    lengths: Sequence[int],
    batch_size: int,
    run: Callable[[list[Item]], Sequence[Result]],
) -> list[Result]:
    """Runs `run` on batches of items of similar length; returns its results in the order of `items`.

    Batches of similar length waste little padding. Items of equal length keep their order, so the batches, and with
    them every random draw inside `run`, depend on the items alone.

    Args:
        items: what to work on, in any order.
        lengths: one length for each item, in any unit.
        batch_size: most items of one batch.
        run: takes a batch, returns one result for each of its items, in their order.

    Raises:
        ValueError: not one length for each item, or not one result for each item of a batch.
        StopRequested: between two batches, as `stop_point`.
    """
    if len(items) != len(lengths):
        raise ValueError(f"{len(lengths)} lengths for {len(items)} items: give one for each")

    # Sorting is stable: items of equal length keep their order.
    order = sorted(range(len(items)), key=lengths.__getitem__)
    results: dict[int, Result] = {}
    for start in range(0, len(order), batch_size):
        stop_point()
        chosen = order[start : start + batch_size]
        batch = run([items[index] for index in chosen])
        results.update(zip(chosen, batch, strict=True))

    return [results[index] for index in range(len(items))]


def all_correct(logits: Tensor, labels: Tensor) -> Tensor:
    """(B,) bool: every labelled token of the row is the argmax; False in a row without labels.

    `logits` (N, V) are those of the labelled tokens in row-major order. Because each argmax is conditioned on a gold
    prefix that equals the generated one as long as all is right, this is "greedy generation gives the gold answer".
    """
    labelled = labels != IGNORE
    right = torch.zeros_like(labelled)
    right[labelled] = logits.argmax(dim=-1) == labels[labelled]
    return (right | ~labelled).all(dim=1) & labelled.any(dim=1)


@dataclass
class Padding:
    """How much of the batches so far was padding.

    tokens: of prompts and targets.
    columns: tokens and pads.
    worst: the largest share of pads in one batch.
    """

    tokens: int = 0
    columns: int = 0
    worst: float = 0.0

    def add(self, tokens: int, columns: int) -> None:
        """Counts a batch."""
        self.tokens += tokens
        self.columns += columns
        self.worst = max(self.worst, 1 - tokens / columns)

    def words(self) -> str:
        """`padding: 4.1 % of the training batches, 9.6 % of the worst`."""
        share = 1 - self.tokens / max(self.columns, 1)
        return f"padding: {100 * share:.1f} % of the training batches, {100 * self.worst:.1f} % of the worst"


def like_lengths(prompts: Sequence[int], targets: Sequence[int], most: int, world: int = 1) -> list[list[int]]:
    """Cuts items into parts of like length, each for `world` ranks; every item is in one of them, as its number.

    A rank's share of a part has at most `most` tokens, pads included, and at most `MOST_PADDING` of a part are pads,
    unless it has one item a rank. An item beyond `most` is a part of its own.

    Args:
        prompts, targets: tokens of each item; as many items as `world` divides.
    """
    order = sorted(range(len(prompts)), key=lambda index: (prompts[index], targets[index]))
    parts: list[list[int]] = []
    part: list[int] = []
    for start in range(0, len(order), world):
        group = order[start : start + world]

        # With the group the part may become too large, or have too many pads: then the group begins the next one.
        wider = [*part, *group]
        columns = _columns(wider, prompts, targets)
        tokens = sum(prompts[index] + targets[index] for index in wider)
        if part and (columns > most * world or tokens < (1 - MOST_PADDING) * columns):
            parts.append(part)
            wider = group
        part = wider
    return [*parts, part]


def _columns(items: Sequence[int], prompts: Sequence[int], targets: Sequence[int]) -> int:
    """Tokens and pads of a part: prompts and targets are padded apart."""
    width = max(prompts[index] for index in items) + max(targets[index] for index in items)
    return width * len(items)


def token_batches(prompts: Sequence[int], targets: Sequence[int], most: int, world: int = 1) -> list[list[list[int]]]:
    """Batches of at most `most` tokens a rank, pads included, each of one or more parts as `like_lengths` makes them.

    A batch is filled up with parts of other lengths, so that none is small because few items are as long.
    """
    parts = like_lengths(prompts, targets, most, world)
    sizes = [_columns(part, prompts, targets) for part in parts]

    # First fit, the largest first.
    batches: list[list[list[int]]] = []
    room: list[int] = []
    for index in sorted(range(len(parts)), key=lambda index: -sizes[index]):
        fits = (number for number, left in enumerate(room) if left >= sizes[index])
        place = next(fits, len(batches))
        if place == len(batches):
            batches.append([])
            room.append(most * world)
        batches[place].append(parts[index])
        room[place] -= sizes[index]
    return batches
