"""A stage's folder, in which an interrupted stage goes on: who makes it, and what it keeps beside TRL's states."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from engine.files import read_json, write_text_aside
from engine.machine import Machine
from grpo.stages import Stage


def read_own(path: Path) -> Any:
    """What a stage left in a file of its folder; None where there is none, or a damaged one: it is made again."""
    try:
        return read_json(path)
    except ValueError:
        return None


def open_folder(place: Path, base: int, machine: Machine) -> None:
    """Makes the stage's folder; states of a run that began this stage from another step than `base` are removed."""
    from grpo.stage_trainer import forget

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
