"""`--dry_run`: tries one batch and says what the run would cost."""

from __future__ import annotations

import time

import options
from engine.fit import fitting_steps, words
from engine.limits import Limits
from engine.machine import Machine, peak_memory
from engine.optimization import BaseTrainer, NonFiniteError
from engine.system import Data, Facts, LoopConfig

TRIES = 3  # the first pays for warming up
NON_FINITE_EXIT = 3  # exit status where loss or gradient is no number


def dry_run(
    config: LoopConfig, machine: Machine, data: Data, trainer: BaseTrainer, facts: Facts, limits: Limits
) -> int:
    """Forward and backward on real batches: loss, parameter counts, estimated time and memory of the run.

    The learning rate is 0 and nothing is written. Returns the exit status.
    """
    # Real batches, drawn as training would draw them.
    times = []
    first = facts.dry_run_step
    for step in range(first, first + TRIES):
        batches = data.next_batches()

        began = time.perf_counter()
        try:
            metrics = trainer.step(batches, step, lr=0.0)
        except NonFiniteError as error:
            machine.say(f"{options.PROG}: {error}: training would stop here; nothing was written")
            return NON_FINITE_EXIT

        times.append((time.perf_counter() - began) / metrics["segments"])

    # The fastest try is nearest to what a step costs once everything is warm.
    seconds = min(times) * facts.segments
    total = limits.words()
    if limits.total_steps:
        total = f"about {seconds * limits.total_steps / 60:.1f} minutes for {total}"

    # Everything for the user; stdout stays empty.
    machine.say(f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f}")
    for name, module in facts.parts.items():
        count = sum(p.numel() for p in module.parameters() if p.requires_grad)
        machine.say(f"  {name:16s} {count:>12,} parameters")
    machine.say(f"{seconds:.2f} s a step of {config.batch_words()}: {total}, evaluation aside")
    if config.fit_minutes:
        machine.say(words(config, seconds, fitting_steps(config, seconds)))
    machine.say(f"peak memory {peak_memory(machine.device) / 2**30:.2f} GiB; nothing was written")
    return 0
