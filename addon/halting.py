"""An alarm for a halting head that halts nobody, or everybody, whatever is right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

EVERY = 100  # batches that one judgement rests on
FLAT = 0.02  # a mean this near to 0 or 1, with a deviation this small, is a collapse
SETTLED = 0.1  # with a smaller share of right answers nobody should halt, with a smaller share of wrong ones everybody
WATCHED = ("halt_probability", "halt_deviation", "teacher_forced_exact")  # metrics of a batch


def collapse(probability: float, deviation: float, right: float) -> str | None:
    """How halting has collapsed in training, in words; None where it has not.

    Args:
        probability, deviation: mean and deviation of the halting probability over examples.
        right: share of right answers, 0 to 1.
    """
    if deviation > FLAT:
        return None

    if probability < FLAT and right > SETTLED:
        return (
            f"halting has collapsed to nothing: mean probability {probability:.3f} though {100 * right:.0f} % of the "
            "answers are right; try --halt_detach, or a longer run"
        )
    if probability > 1 - FLAT and right < 1 - SETTLED:
        return (
            f"halting has collapsed to all: mean probability {probability:.3f} though only {100 * right:.0f} % of the "
            "answers are right; lower --act_penalty or try --halt_detach"
        )
    return None


def evaluation_collapse(used: Sequence[int], limit: int, solved: float) -> str | None:
    """How halting has collapsed at an evaluation, in words; None where it has not, or had nothing to choose.

    Args:
        used: segments that each example used.
        limit: most segments of an example.
        solved: share of solved items, 0 to 1.
    """
    if limit < 2 or not used:
        return None

    if min(used) >= limit and solved > SETTLED:
        return (
            f"no example halted before segment {limit} at evaluation though {100 * solved:.0f} % were solved: halting "
            "has collapsed to nothing"
        )
    if max(used) <= 1 and solved < 1 - SETTLED:
        return (
            f"every example halted after 1 of {limit} segments at evaluation though only {100 * solved:.0f} % were "
            "solved: halting has collapsed to all"
        )
    return None


class HaltingAlarm:
    """Watches a run's batches, and judges `EVERY` of them together."""

    def __init__(self) -> None:
        self._batches: list[tuple[float, ...]] = []  # `WATCHED` of each batch since the last judgement

    def update(self, step: int, metrics: Mapping[str, float]) -> str | None:
        """Takes in batch `step`. Returns the alarm, if a judgement is due and there is cause.

        A run without a halting head has no such metrics and no alarm.
        """
        if "halt_probability" not in metrics:
            return None
        self._batches.append(tuple(float(metrics[name]) for name in WATCHED))
        if step % EVERY:
            return None

        columns = zip(*self._batches, strict=True)
        means = [sum(column) / len(column) for column in columns]
        self._batches = []
        return collapse(*means)
