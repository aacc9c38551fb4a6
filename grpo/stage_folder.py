"""A stage's folder, in which an interrupted stage goes on: TRL's states, whole and hashed, and what is kept beside."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import PartialState
from safetensors import SafetensorError

from engine.checkpoints import damage_of, seal
from engine.files import WriteError, read_json, reason_of, sync_folder, write_problem, write_text_aside
from engine.machine import Machine
from grpo.stages import Stage

STATE = "state-"  # and the optimizer step of the stage: a state that an interrupted stage goes on from
OLDER = "checkpoint-"  # what earlier versions called it; such a state has no hashes
STATES_KEPT = 2  # the second where the newest is damaged


# --- states -----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def written_aside(place: Path, needed: int) -> Iterator[Path]:
    """A folder that others write files to, which then is `place`: whole and with its hashes, or not there.

    Args:
        place: the folder. One that exists is damaged, and replaced.
        needed: about as many bytes as are written, told where the disk is full.

    Raises:
        WriteError: the disk refuses; nothing is left of the folder.
    """
    aside = aside_of(place)
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        yield aside
        seal(aside)
        shutil.rmtree(place, ignore_errors=True)  # a damaged one
        os.rename(aside, place)
        sync_folder(place.parent)
    except (OSError, RuntimeError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)  # before free space is looked at
        is_torch_writing = "PytorchStreamWriter" in str(error) or "inline_container" in str(error)
        if isinstance(error, RuntimeError) and not is_torch_writing:
            raise
        raise WriteError(write_problem(place, as_system_error(error, place, needed), needed)) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def aside_of(place: Path) -> Path:
    """Where a folder is written before it has its name: one run at a time writes to a stage."""
    return place.with_name(f".tmp-{place.name}")


def as_system_error(error: Exception, place: Path, needed: int) -> OSError:
    """What the system answered: torch and safetensors do not hand on why they could not write."""
    if isinstance(error, OSError):
        return error
    is_full = shutil.disk_usage(place.parent).free < needed or "os error 28" in str(error)
    return OSError(errno.ENOSPC if is_full else None, reason_of(error))


def newest_state(folder: Path, warn: Callable[[str], None] | None = None) -> Path | None:
    """The newest whole state of an interrupted stage; those that are damaged are passed over, and `warn` is told."""
    states = [path for path in folder.glob(f"{STATE}*") if path.is_dir()]
    older = [path.parent for path in folder.glob(f"{OLDER}*/trainer_state.json")]
    for state in sorted([*states, *older], key=step_of_state, reverse=True):
        damage = damage_of(state) if state in states else None
        if damage is None:
            return state
        if warn:
            warn(f"WARNING: {damage}: {state} is passed over")
    return None


def step_of_state(state: Path) -> int:
    """The optimizer step of the stage after which a state was saved."""
    return int(state.name.rpartition("-")[2])


def forget(folder: Path) -> None:
    """Removes the states of a finished stage: its checkpoint proper has been written."""
    shutil.rmtree(folder, ignore_errors=True)


def forget_older(folder: Path) -> None:
    """Removes all but the newest states. Raises OSError."""
    states = sorted(folder.glob(f"{STATE}*"), key=step_of_state)
    for state in states[:-STATES_KEPT]:
        # Renamed first: a deletion cut short must not leave half a state under its name.
        doomed = state.with_name(f".tmp-{state.name}")
        os.rename(state, doomed)
        shutil.rmtree(doomed)


def save_reference(model: Any, folder: Path) -> Path:
    """The folder with the model as the stage began, written once and whole; a resumed stage keeps it. WriteError."""
    place = folder / "reference"
    with PartialState().main_process_first():
        if damage_of(place) is not None:  # of an earlier version as well, which kept no hashes
            with written_aside(place, bytes_of(model)) as aside:
                model.save_pretrained(aside)
    return place


def bytes_of(model: Any, learns: bool = False) -> int:
    """Bytes of a model's weights; `learns`: of those that train alone."""
    return sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad or not learns)


# --- the folder and its own files -------------------------------------------------------------------------------------


def read_own(path: Path) -> Any:
    """What a stage left in a file of its folder; None where there is none, or a damaged one: it is made again."""
    try:
        return read_json(path)
    except ValueError:
        return None


def open_folder(place: Path, base: int, machine: Machine) -> None:
    """Makes the stage's folder; states of a run that began this stage from another step than `base` are removed."""
    # One process writes, and the others wait until the folder is as it should be.
    if not machine.is_main:
        machine.wait()
        return

    # The state of another beginning would go on from weights that are not the stage's.
    mark = place / "begun_at.json"
    if place.exists() and read_own(mark) != base:
        forget(place)

    place.mkdir(parents=True, exist_ok=True)
    write_text_aside(mark, json.dumps(base))
    machine.wait()


def as_begun(stage: Stage, place: Path, machine: Machine, goes_on: bool) -> Stage:
    """The stage with as many completions an optimizer step as it began with, however many processes share them.

    TRL tells the place in the questions by the number of steps alone.

    Raises:
        ValueError: these processes cannot share so many.
    """
    config = stage.config
    path = place / "completions.json"
    each = config.grpo_batch_size * machine.world
    kept = machine.of_main(lambda: read_own(path)) if goes_on else None
    if kept is None:
        if machine.is_main:
            write_text_aside(path, json.dumps(each * config.grpo_accum_steps))
        return stage
    if kept == each * config.grpo_accum_steps:
        return stage

    accum, rest = divmod(kept, each)
    if rest:
        raise ValueError(
            f"stage {stage.name} began with {kept} completions a step, which {machine.world} processes of "
            f"--grpo_batch_size {config.grpo_batch_size} cannot share: choose a batch or a number of processes "
            "that divides it"
        )
    machine.say(
        f"stage {stage.name} goes on with {kept} completions a step, as it began: --grpo_accum_steps {accum}"
    )
    return replace(stage, config=replace(config, grpo_accum_steps=accum))
