"""How a run begins: its folder, whether that is still as it was chosen, and the first lines that it says."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path

from accelerate.utils import gather_object

from engine.checkpoints import FOLDER, checkpoint_folders, damage_of, newest_checkpoint
from engine.limits import Warmup
from engine.machine import Machine, run_folder
from engine.patience import patience_warning
from engine.resume import written_and_name
from engine.system import Facts, LoopConfig

LONGEST_LABEL = 60  # characters of it in a folder's name


def folder_of(config: LoopConfig, label: str, checkpoint: Path | None) -> Path:
    """The run's folder: that of the checkpoint it goes on from, else a named one, else one with the date."""
    # Each process has a clock of its own; the first one's decides.
    dated = gather_object([new_name(Path(config.save_dir), label)])[0]
    return run_folder(config, checkpoint) or Path(config.save_dir) / dated


def new_name(save_dir: Path, label: str) -> str:
    """A folder's name with the date of now that no run in `save_dir` has, those of the same second included."""
    name = f"{label[:LONGEST_LABEL]}-{datetime.now():%Y%m%d-%H%M%S}"
    free = name
    number = 1
    while (save_dir / free).exists():
        number += 1
        free = f"{name}-{number}"

    return free


def check_untouched(folder: Path, checkpoint: Path | None, resume: str | None, run_name: str | None) -> None:
    """Asks, once `folder` is this process's own, whether its run is still as far as when `checkpoint` was chosen.

    Loading takes a while. A run of the same name may have begun and ended meanwhile, and would be overwritten.
    A call that names one checkpoint goes on from that one, whatever came after it.

    Args:
        folder: the run's folder.
        checkpoint: the checkpoint that the call goes on from, of this run or another; None = it begins anew.
        resume, run_name: the flags, as typed.

    Raises:
        ValueError: another process has written a checkpoint of this run since.
    """
    chosen = None
    if checkpoint is not None and checkpoint.parent.name == FOLDER:
        if checkpoint.parent.parent.resolve() == folder.resolve():
            chosen = checkpoint.name

    typed = resume or ""
    if chosen and (typed.endswith("@best") or Path(typed).resolve().name == chosen):
        return

    # As the call chose it: without a name, --resume auto takes what was written last.
    newest = _last_written(folder) if typed == "auto" and not run_name else newest_checkpoint(folder)
    if newest is not None and newest.name != chosen:
        raise ValueError(
            f"{folder} was written by another process while this one loaded: the same command again goes on from "
            f"{newest.name}, another --run_name begins anew"
        )


def _last_written(run: Path) -> Path | None:
    """The checkpoint written last; not that of the highest step in a run that went on from an earlier one."""
    folders = sorted(checkpoint_folders(run), key=written_and_name, reverse=True)
    return next((folder for folder in folders if damage_of(folder) is None), None)


def introduce(config: LoopConfig, machine: Machine, facts: Facts, warmup: Warmup, step: int) -> None:
    """The first lines: model, data, how long the run is, and the batch `step` it goes on from."""
    work = f"{warmup.limits.words()} of {config.batch_words()}"
    if config.eval_only:
        work = "evaluation only"
    line = f"{facts.introduction}; {work}"
    if step:
        line += f", from step {step}"
    machine.say(line)

    warnings = [warmup.warning(config)]
    if "patience" in config.explicit:
        warnings.append(patience_warning(config.patience, config.eval_every, warmup.limits.total_steps))
    for warning in filter(None, warnings):
        if not config.eval_only:
            machine.say(warning)
    if machine.world > 1:
        machine.say(f"{machine.world} processes, {config.batch_size * machine.world} examples a batch")
