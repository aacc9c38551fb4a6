"""Is the halting head worth its name: an alarm for a collapse to all or nothing, and its calibration.

Calibration compares the head's probability with how often the answer is right: reliability bins and the expected
calibration error (Guo et al. 2017, arXiv 1706.04599).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

EVERY = 100  # batches a judgement rests on
FLAT = 0.02  # mean and deviation of the halting probability this near to an end are a collapse
SETTLED = 0.1  # share of right (wrong) answers under which halting nobody (everybody) is what it should do


@dataclass(frozen=True)
class Bin:
    """The predictions with a probability in [low, high), the last bin with its end."""

    low: float
    high: float
    n: int
    probability: float  # mean of the predictions
    right: int  # how many came true


def reliability(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> list[Bin]:
    """Equally wide bins of probability that hold anything, in order.

    Raises:
        ValueError: not one outcome per probability, or a probability outside [0, 1].
    """
    if len(probabilities) != len(right):
        raise ValueError(f"need one outcome per probability, got {len(right)} for {len(probabilities)}")
    if not all(0 <= p <= 1 for p in probabilities):
        raise ValueError("probabilities must lie in [0, 1]")
    members: dict[int, list[tuple[float, bool]]] = {}
    for p, outcome in zip(probabilities, right, strict=True):
        members.setdefault(min(int(p * bins), bins - 1), []).append((p, outcome))
    return [Bin(index / bins, (index + 1) / bins, len(held), sum(p for p, _ in held) / len(held),
                sum(outcome for _, outcome in held)) for index, held in sorted(members.items())]


def calibration_error(probabilities: Sequence[float], right: Sequence[bool], bins: int = 10) -> float:
    """Expected calibration error: mean |probability - share right| over bins by their counts; 0 of nothing."""
    held = reliability(probabilities, right, bins)
    return sum(abs(b.probability * b.n - b.right) for b in held) / max(len(probabilities), 1)


def collapse(probability: float, deviation: float, right: float) -> str | None:
    """How halting has collapsed, in words, or None: mean and deviation of its probability, share of right answers."""
    if deviation > FLAT:
        return None
    if probability < FLAT and right > SETTLED:
        return (f"halting has collapsed to nothing: mean probability {probability:.3f} though {100 * right:.0f} % of "
                "the answers are right; try --halt_detach, or a longer run")
    if probability > 1 - FLAT and right < 1 - SETTLED:
        return (f"halting has collapsed to all: mean probability {probability:.3f} though only {100 * right:.0f} % of "
                "the answers are right; lower --act_penalty or try --halt_detach")
    return None


def evaluation_collapse(used: Sequence[int], limit: int, solved: float) -> str | None:
    """As `collapse`, from the segments that an evaluation used of `limit`; None where there was nothing to choose."""
    if limit < 2 or not used:
        return None
    if min(used) >= limit and solved > SETTLED:
        return (f"no example halted before segment {limit} at evaluation though {100 * solved:.0f} % were solved: "
                "halting has collapsed to nothing")
    if max(used) <= 1 and solved < 1 - SETTLED:
        return (f"every example halted after 1 of {limit} segments at evaluation though only {100 * solved:.0f} % were "
                "solved: halting has collapsed to all")
    return None


class HaltingAlarm:
    """Watches a run's batches and judges every `EVERY` of them."""

    def __init__(self) -> None:
        self._seen: list[tuple[float, float, float]] = []

    def update(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Takes in batch `step`; the alarm, if it is due and there is cause. Runs without a halting head never are."""
        if "halt_probability" not in metrics:
            return None
        names = ("halt_probability", "halt_deviation", "teacher_forced_exact")
        self._seen.append(tuple(float(metrics[name]) for name in names))
        if step % EVERY:
            return None
        means = [sum(column) / len(column) for column in zip(*self._seen, strict=True)]
        self._seen = []
        return collapse(*means)
