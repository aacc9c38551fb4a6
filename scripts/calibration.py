"""How far probabilities can be trusted: reliability bins and the expected calibration error.

A probability is calibrated where what it speaks of comes true that often: of the answers to which the halting head
gives 0.8, four in five are right (Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Bin:
    """The predictions with a probability in [low, high), the last bin with its end.

    probability: mean of the predictions. right: how many of the n came true.
    """

    low: float
    high: float
    n: int
    probability: float
    right: int


def reliability(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """Equally wide bins of probability that hold anything, in order.

    Raises:
        ValueError: not one outcome per probability, or a probability outside [0, 1].
    """
    if len(probabilities) != len(right):
        raise ValueError(f"need one outcome per probability, got {len(right)} for {len(probabilities)}")
    if not all(0 <= probability <= 1 for probability in probabilities):
        raise ValueError("probabilities must lie in [0, 1]")

    # A probability of 1 belongs to the last bin.
    members: dict[int, list[tuple[float, bool]]] = {}
    for probability, outcome in zip(probabilities, right, strict=True):
        index = min(int(probability * bins), bins - 1)
        members.setdefault(index, []).append((probability, outcome))

    filled = []
    for index, pairs in sorted(members.items()):
        mean = sum(probability for probability, _ in pairs) / len(pairs)
        came_true = sum(outcome for _, outcome in pairs)
        filled.append(Bin(index / bins, (index + 1) / bins, len(pairs), mean, came_true))
    return filled


def calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: mean |probability - share right| over bins by their counts; 0 of nothing.

    Raises:
        ValueError: as `reliability`.
    """
    gaps = [abs(b.probability * b.n - b.right) for b in reliability(probabilities, right, bins)]
    return sum(gaps) / max(len(probabilities), 1)
