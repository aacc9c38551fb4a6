"""How far a GRPO run has come, and the record of that in its checkpoints."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from engine.checkpoints import read_checkpoint
from grpo.stages import HeldOut, Stage

PROGRESS = "grpo.json"  # a checkpoint's file
Metrics = dict[str, float]  # metric -> value, as `Measured.means` names them
# Names in the file, where they are not the fields': older checkpoints have them too.
FILE_NAMES = {"conditions": "asked"}


@dataclass
class GrpoProgress:
    """Which stages lie behind a run, and what they did.

    Args:
        step: optimizer steps in all, those of the warm start included.
        done: stage name -> metrics at its end, of every finished stage.
        start: stage name -> metrics before its first step.
        conditions: stage name -> what these metrics were measured on, as `conditions_of` says.
        elapsed_s: seconds of the run.
        left_out: optimizer steps that were left out, since a gradient was no number.
    """

    step: int
    done: dict[str, Metrics] = field(default_factory=dict)
    start: dict[str, Metrics] = field(default_factory=dict)
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    elapsed_s: float = 0.0
    left_out: int = 0

    def document(self) -> str:
        """The text of `grpo.json`."""
        record = dict(vars(self))
        for name, in_file in FILE_NAMES.items():
            record[in_file] = record.pop(name)
        return json.dumps(record)


def read_progress(checkpoint: Path) -> GrpoProgress | None:
    """How far the run of a checkpoint had come in its stages; None: it has not begun them."""
    documents = read_checkpoint(checkpoint, stems=[]).documents
    if PROGRESS not in documents:
        return None

    # Fields that are newer than the checkpoint have their defaults.
    record = json.loads(documents[PROGRESS])
    for name, in_file in FILE_NAMES.items():
        record[name] = record.pop(in_file, {})
    return GrpoProgress(**record)


def conditions_of(stage: Stage, held_out: HeldOut) -> dict[str, Any]:
    """What a stage's held-out metrics are measured on: reward weights, number of questions, a digest of them."""
    problems = held_out.problems[stage.name]
    text = "\n".join(problem.question for problem in problems)

    # Not each question by itself: the record is kept in every checkpoint.
    digest = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"rewards": dict(stage.rewards), "n": len(problems), "questions": digest}
