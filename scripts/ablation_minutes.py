"""Equal minutes for the arms of a grid: the short run that measures an arm's speed, and the length that follows."""

from __future__ import annotations

import dataclasses

from ablation_grid import Job


def calibration_job(job: Job, steps: int) -> Job:
    """The short run that measures an arm's speed on a task: every batch timed, one item evaluated."""
    short = {
        "max_steps": steps,
        "warmup_steps": min(int(job.flags.get("warmup_steps", 50)), steps),
        "log_steps": 1,
        "eval_n": 1,
        "eval_every": 0,
        "save_every": 0,
        "log_samples_every": 0,
        "eval_suite": None,
    }
    return dataclasses.replace(job, flags=job.flags | short)


def with_steps(job: Job, minutes: float, seconds: float | None) -> Job:
    """The run with as many batches of `seconds` as fit into `minutes`, so that its schedule ends where its time ends.

    Seconds None: nothing trains in this arm, and the run stays as it is.
    """
    if seconds is None:
        return job

    # Warm-up must not be all there is.
    steps = max(round(60 * minutes / seconds), 1)
    length = {"max_steps": steps}
    if int(job.flags.get("warmup_steps", 0)) > steps:
        length["warmup_steps"] = steps // 2
    return dataclasses.replace(job, flags=job.flags | length)
