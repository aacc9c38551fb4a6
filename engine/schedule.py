"""The learning rate over a run. Imports nothing heavy."""

from __future__ import annotations

import math
from dataclasses import dataclass

COOLDOWN = 0.3


@dataclass(frozen=True)
class ScheduleConfig:
    """The learning rate over a run; each field is the flag of its name.

    lr: peak learning rate, above 0.
    lr_scheduler: cosine, linear, constant, or wsd (constant, then linear over the last `COOLDOWN`; MiniCPM, arXiv
        2404.06395), after the warmup.
    lr_min_ratio: share of `lr` that the fall ends at, 0 to 1.
    lr_fall: what the fall is stretched over: what the warmup leaves (after_warmup), or the whole run, its
        unseen beginning behind the warmup (whole_run), as in checkpoints that are older than this flag.
    """

    lr: float = 3e-3
    lr_scheduler: str = "cosine"
    lr_min_ratio: float = 0.0
    lr_fall: str = "after_warmup"


def learning_rate(
    schedule: ScheduleConfig, step: int, progress: float, warmup: int, warmed: float = 0.0
) -> float:
    """Learning rate of a batch: a linear rise over the warmup, then the schedule's fall from the peak it has reached.

    Args:
        schedule: peak, form and floor; the fall never goes under `lr_min_ratio x lr`.
        step: number of the batch, from 0.
        progress: share of the run that is done, 0 to 1.
        warmup: batches of the rise; 0 = none.
        warmed: share of the run that was done when the rise was, 0 to 1.
    """
    if step < warmup:
        return schedule.lr * (step + 1) / warmup

    # The fall begins where the rise has ended: over the whole run a long warmup would end in a drop.
    if schedule.lr_fall == "after_warmup" and warmed > 0:
        left = 1 - warmed
        progress = max(progress - warmed, 0.0) / left if left > 0 else 0.0

    # What is left of the way from peak to floor, from 1 down to 0.
    if schedule.lr_scheduler == "cosine":
        falling = 0.5 * (1 + math.cos(math.pi * progress))
    elif schedule.lr_scheduler == "linear":
        falling = 1 - progress
    elif schedule.lr_scheduler == "wsd":
        falling = min((1 - progress) / COOLDOWN, 1.0)
    else:
        falling = 1.0

    return schedule.lr * (schedule.lr_min_ratio + (1 - schedule.lr_min_ratio) * falling)
