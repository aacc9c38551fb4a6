"""When a run ends, and how far it is."""

from __future__ import annotations

import math
from dataclasses import dataclass

from engine.machine import Machine
from engine.system import Data, LoopConfig


@dataclass(frozen=True)
class Limits:
    """A run ends after `total_steps` batches (None: no limit) or after `max_minutes` (0: no limit), the nearer one."""

    total_steps: int | None
    max_minutes: float
    machine: Machine

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the run is done, 0 to 1; alike in all processes, which end together."""
        by_steps = 0.0
        if self.total_steps:
            by_steps = step / self.total_steps

        # Each process has a clock of its own.
        by_time = 0.0
        if self.max_minutes:
            by_time = self.machine.mean_of_processes(elapsed_s) / (60 * self.max_minutes)
        return min(max(by_steps, by_time), 1.0)

    def warmup(self, wanted: int) -> int:
        """Batches over which the learning rate rises: as wanted, but at most half of the run."""
        if self.total_steps is None:
            return wanted
        return min(wanted, self.total_steps // 2)

    def words(self) -> str:
        """`1900 steps` or `3.0 minutes`."""
        if self.total_steps:
            return f"{self.total_steps} steps"
        return f"{self.max_minutes} minutes"


@dataclass
class Warmup:
    """How much of a run its warmup of `steps` batches takes.

    `seconds` of the run had passed when it ended; None: it lasts, or nobody noted it. A checkpoint keeps them where
    the clock limits the run.
    """

    limits: Limits
    steps: int
    seconds: float | None = None
    _share: float | None = None

    def share(self, step: int, elapsed_s: float) -> float:
        """How much of the run was done when the warmup ended, 0 to 1; 0 while it lasts. Every process asks alike."""
        if step < self.steps:
            return 0.0
        if self._share is None:
            # Of a checkpoint that does not know its seconds the batches tell them.
            if self.seconds is None:
                self.seconds = elapsed_s * self.steps / max(step, 1)
            self._share = self.limits.share(self.steps, self.seconds)

        return self._share

    def document(self) -> float | None:
        """What a checkpoint keeps: the seconds where they decide, 0 where the batches do, None while nobody knows."""
        total = self.limits.total_steps
        by_steps = self.steps / total if total else 0.0
        if self.seconds is None or not self.limits.max_minutes:
            return None
        return 0.0 if self._share == by_steps else self.seconds

    def warning(self, config: LoopConfig) -> str | None:
        """What to say where the user asked for a longer warmup than this."""
        if self.steps >= config.warmup_steps or "warmup_steps" not in config.explicit:
            return None
        return f"WARNING: --warmup_steps {config.warmup_steps} is cut to {self.steps}, half of the run"


def limits_of(config: LoopConfig, data: Data, machine: Machine) -> Limits:
    """The limits of a run; the size of the data counts where --epochs limits it."""
    steps = config.max_steps
    if config.epochs and not config.eval_only:
        items = config.batch_size * config.grad_accum_steps * machine.world  # of a batch
        by_epochs = math.ceil(config.epochs * data.size / items)

        # Steps that were set as well end the run earlier.
        if steps:
            steps = min(steps, by_epochs)
        else:
            steps = by_epochs

    return Limits(steps or None, config.max_minutes, machine)
