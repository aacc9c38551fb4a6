"""Is the halting head worth its name: an alarm for a collapse to all or nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EVERY = 100  # batches a judgement rests on
FLAT = 0.02  # mean and deviation of the halting probability this near to an end are a collapse
SETTLED = 0.1  # share of right (wrong) answers under which halting nobody (everybody) is what it should do


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
