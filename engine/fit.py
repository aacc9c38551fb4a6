"""How many steps a run has where nobody has said so: as many as this machine trains in a few minutes.

The first batches are tried out and timed, then everything is put back, so that a run of the same number of steps that
was typed is the same run.
"""

from __future__ import annotations

import dataclasses
import time

import options
from engine.machine import Machine
from engine.optimization import BaseTrainer, NonFiniteError
from engine.state import put_back
from engine.system import Data, LoopConfig

WARM = 2  # the first batches pay for what libraries set up
TIMED = 6
LEAST = 100  # steps: fewer teach nothing


def fitted(config: LoopConfig, machine: Machine, data: Data, trainer: BaseTrainer, step: int) -> LoopConfig:
    """The configuration of the same run with the steps that fit into `fit_minutes`; tells the user.

    What the run records has these steps as if they were typed. A run that is at `step` above 0 has its number already.
    Raises ValueError as `data.next_batches`.
    """
    if not config.fit_minutes or config.eval_only or config.dry_run:
        return config
    if step:
        machine.say(f"WARNING: --fit_minutes is for a new run: this one goes on to {config.max_steps} steps")
        return config

    seconds = seconds_of_step(data, machine, trainer)
    steps = config.max_steps
    if seconds is not None:  # else training itself meets the loss that is no number, and tells it
        steps = fitting_steps(config, seconds)
        machine.say(words(config, seconds, steps))

    flags = {**config.flags, "max_steps": steps, "fit_minutes": 0.0}
    settings = options.rerun_text(options.Options(**flags))
    return dataclasses.replace(config, max_steps=steps, fit_minutes=0.0, flags=flags, settings=settings)


def seconds_of_step(data: Data, machine: Machine, trainer: BaseTrainer) -> float | None:
    """Seconds of a step, drawing its items included; alike in all processes. Trainer and data are as before.

    None where the loss or a gradient of the first batches is no number.
    """
    position = data.state()
    with put_back(trainer):
        try:
            for step in range(WARM + TIMED):
                if step == WARM:
                    began = time.perf_counter()
                trainer.step(data.next_batches(), step, lr=0.0)
        except NonFiniteError:
            return None
        finally:
            data.load_state(position)
        seconds = (time.perf_counter() - began) / TIMED

    return machine.mean_of_processes(seconds)


def fitting_steps(config: LoopConfig, seconds: float) -> int:
    """The steps of `seconds` each that fit into `fit_minutes`: `LEAST` or more, and `max_steps` at most."""
    assert config.fit_minutes
    steps = int(60 * config.fit_minutes / seconds)
    return min(max(steps, LEAST), config.max_steps)


def words(config: LoopConfig, seconds: float, steps: int) -> str:
    """How long the whole run would take, and what is done about it."""
    whole = f"{config.max_steps:,} steps"
    minutes = minutes_text(seconds * config.max_steps)
    if steps == config.max_steps:
        return f"{whole} take {minutes} here, evaluation aside: training all of them"
    return (f"{whole} would take {minutes} here; training {minutes_text(seconds * steps)}, {steps:,} steps "
            f"(--fit_minutes {config.fit_minutes:g}; --max_steps N trains N)")


def minutes_text(seconds: float) -> str:
    """`31 minutes`, `7 minutes`, `0.4 minutes`."""
    minutes = seconds / 60
    return f"{minutes:.0f} minutes" if minutes >= 10 else f"{minutes:.2g} minutes"
