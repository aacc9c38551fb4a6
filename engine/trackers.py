"""Experiment trackers beside the run's own files: accelerate's tensorboard, wandb and trackio."""

from __future__ import annotations

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.records import plain

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

TRACKERS = ("tensorboard", "wandb", "trackio")


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError naming the first unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}, expected {', '.join(TRACKERS)}; correct --trackers")
        # `find_spec` fails on a module that was set to None, which hides an installed one.
        hidden = name in sys.modules and sys.modules[name] is None
        if hidden or importlib.util.find_spec(name) is None:
            raise ValueError(f"--trackers {name} needs a package that is not installed; run: pip install {name}")


def start_tracker(name: str, folder: Path, config: dict[str, Any], after: int | None) -> GeneralTracker:
    """A tracker at work; `log(numbers, step=)` and `finish()` are its own.

    Its package is imported here, so only when asked for. `Accelerator.init_trackers` is left out: it gives all trackers
    one project name, which would move tensorboard's folder, and `end_training` takes the process group away from the
    stages and the suite that follow.

    Args:
        name: one of `TRACKERS`.
        folder: the run's folder. The run is called after it, the project after the folder around it.
        config: every flag.
        after: the step that the run goes on from; what tensorboard holds of later steps is dropped. None: a new run.
    """
    from accelerate import tracking

    # JSON's values: tensors and infinities would not be taken.
    settings = plain(config)
    project = folder.parent.name or "runs"

    if name == "tensorboard":
        purge_step = after + 1 if after is not None else None  # the first step that is dropped
        tracker = tracking.TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=purge_step)
    elif name == "wandb":
        tracker = tracking.WandBTracker(project, name=folder.name, dir=folder, config=settings, mode=_wandb_mode())
    else:
        tracker = tracking.TrackioTracker(project, name=folder.name, config=settings)

    tracker.start()
    if name == "tensorboard":
        # As text: its own hyperparameters would be a second run in a folder of their own.
        tracker.log({"config": f"```json\n{json.dumps(settings, indent=2)}\n```"})
    return tracker


def _wandb_mode() -> str:
    """online, offline or disabled: a run is never stopped for a login, so online only where one is arranged for."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if "WANDB_API_KEY" in os.environ:
        return "online"
    return "offline"
