"""How a run begins: its folder, and the first lines that it says."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from accelerate.utils import gather_object

from engine.limits import Warmup
from engine.machine import Machine, run_folder
from engine.system import Facts, LoopConfig

LONGEST_LABEL = 60  # characters of it in a folder's name


def folder_of(config: LoopConfig, label: str, checkpoint: Path | None) -> Path:
    """The run's folder: that of the checkpoint it goes on from, else a named one, else one with the date."""
    # Each process has a clock of its own; the first one's decides.
    dated = gather_object([f"{label[:LONGEST_LABEL]}-{datetime.now():%Y%m%d-%H%M%S}"])[0]
    return run_folder(config, checkpoint) or Path(config.save_dir) / dated


def introduce(config: LoopConfig, machine: Machine, facts: Facts, warmup: Warmup, step: int) -> None:
    """The first lines: model, data, how long the run is, and the batch `step` it goes on from."""
    work = f"{warmup.limits.words()} of {config.batch_words()}"
    if config.eval_only:
        work = "evaluation only"
    line = f"{facts.introduction}; {work}"
    if step:
        line += f", from step {step}"
    machine.say(line)

    warning = warmup.warning(config)
    if warning and not config.eval_only:
        machine.say(warning)
    if machine.world > 1:
        machine.say(f"{machine.world} processes, {config.batch_size * machine.world} examples a batch")
