"""What all batches share: the label that is ignored, what counts as right, work on items of different lengths."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from engine.stopping import stop_point

# A label that no loss counts: padding, and tokens that are read but not learned. torch's losses ignore it by default.
IGNORE = -100

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
