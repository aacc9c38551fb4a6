"""Early stopping: training ends when several evaluations in a row bring nothing better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from engine.report import Report

RISE = "rise"
WORDS = {
    "solved": "the solved rate was no better than the best before",
    "loss": "the held-out loss was no lower than the lowest before",
    RISE: "the validation loss rose",
}


@dataclass(frozen=True)
class PatienceConfig:
    """When training ends early; each field is the flag of its name.

    patience: evaluations in a row without anything better that end training; 0 = never.
    patience_on: what must get better: `solved` (a new best rate), `loss` (a new lowest held-out loss), or `rise`: the
        loss must not be higher than at the evaluation before.
    patience_grace_steps: first batches whose evaluations do not count.
    """

    patience: int = 0
    patience_on: str = "solved"
    patience_grace_steps: int = 0


def patience_warning(patience: int, eval_every: int, total_steps: int | None) -> str | None:
    """What to say where a run of `total_steps` (None = nobody knows) is too short for patience to end it."""
    if not patience or not eval_every or not total_steps:
        return None

    # The first evaluation is what the next ones are compared with; the last step ends the run by itself.
    amid = (total_steps - 1) // eval_every
    if amid > patience:
        return None

    return (f"WARNING: --patience {patience} needs {patience + 1} evaluations amid training, and --eval_every "
            f"{eval_every} gives {amid} in {total_steps} steps: it cannot end this run; lower --eval_every")


class Patience:
    """Counts the evaluations amid training. A checkpoint keeps the count (`document`)."""

    def __init__(self, config: PatienceConfig):
        self.config = config
        self.worse = 0  # evaluations in a row without anything better
        self.best: float | None = None  # a loss negative, so that more is better; with `rise` the last loss as it is

    def update(self, step: int, report: Report) -> None:
        """Counts the evaluation of `step`. Without `report.loss`, where that is watched, nothing is counted."""
        on = self.config.patience_on
        value = report.rate if on == "solved" else report.loss
        if value is None:
            return

        # A loss that is no number is worse than any: it would compare as none.
        if on == RISE:
            is_worse = self.best is not None and (value > self.best or math.isnan(value))
            self.best = value
        else:
            gain = value if on == "solved" else -value
            is_worse = self.best is not None and not gain > self.best
            self.best = self.best if is_worse or math.isnan(gain) else gain

        # The grace steps are a time in which the figures may do what they like.
        self.worse = self.worse + 1 if is_worse and step > self.config.patience_grace_steps else 0

    def ended(self) -> str | None:
        """Why training ends, in words; None where patience is left."""
        patience = self.config.patience
        if not patience or self.worse < patience:
            return None
        words = WORDS[self.config.patience_on]
        return f"{words} {self.worse} times in a row (--patience {patience})"

    def document(self) -> dict[str, Any]:
        """What a checkpoint keeps, JSON-able."""
        return {"on": self.config.patience_on, "worse": self.worse, "best": self.best}

    def restore(self, saved: Mapping[str, Any], extra: Mapping[str, Any]) -> None:
        """Goes on from what `document` gave; a count of something else is not gone on with.

        `extra` is what a system kept: checkpoints of the hybrid from before `--patience` have their count there.
        """
        if not saved and "rises" in extra:
            saved = {"on": RISE, "worse": extra["rises"], "best": extra.get("validation_loss")}
        if saved.get("on") == self.config.patience_on:
            self.worse = saved["worse"]
            self.best = saved["best"]
