"""Experiment trackers beside the run's own files, those of accelerate: numbers of each logged step, and of each
evaluation its rates, intervals and a table of answers."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engine.records import plain
from engine.run_records import item_of, spread

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

# Name, as accelerate spells it -> the package to install.
PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "trackio": "trackio",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "swanlab": "swanlab",
    "aim": "aim",
}
TRACKERS = tuple(PACKAGES)
TABLE = "predictions"
COLUMNS = ("task", "question", "gold", "text", "score", "bare_text")
ROWS = 20  # of the table of an evaluation


def check_trackers(names: Sequence[str]) -> None:
    """Raises ValueError naming the first unknown tracker, or one whose package is not installed."""
    for name in names:
        if name not in TRACKERS:
            raise ValueError(f"unknown tracker {name!r}, expected {', '.join(TRACKERS)}; correct --trackers")
        # `find_spec` fails on a module that was set to None, which hides an installed one.
        hidden = name in sys.modules and sys.modules[name] is None
        if hidden or importlib.util.find_spec(name) is None:
            package = PACKAGES[name]
            raise ValueError(f"--trackers {name} needs a package that is not installed; run: pip install {package}")


def start_tracker(name: str, folder: Path, config: dict[str, Any], after: int | None) -> GeneralTracker:
    """A tracker at work; `log(numbers, step=)` and `finish()` are its own.

    Its package is imported here, so only when asked for. accelerate's trackers need its state of the process, which
    `start_machine` makes. `Accelerator.init_trackers` is left out: it gives all trackers
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
    starts = {"tensorboard": _tensorboard, "wandb": _wandb, "trackio": _trackio, "mlflow": _mlflow, "comet_ml": _comet,
              "swanlab": _swanlab, "aim": _aim}
    tracker = starts[name](tracking, folder, folder.parent.name or "runs", settings, after)
    tracker.start()

    # Those that took the flags with their start have them; tensorboard's own hyperparameters would be a second run.
    if name == "tensorboard":
        tracker.log({"config": f"```json\n{json.dumps(settings, indent=2)}\n```"})
    elif name in ("mlflow", "comet_ml", "aim"):
        tracker.store_init_configuration(settings)
    return tracker


# --- one function each: (accelerate, the folder, project, flags, step gone on from) -> a tracker that has not started


def _tensorboard(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    purge_step = after + 1 if after is not None else None  # the first step that is dropped
    return tracking.TensorBoardTracker("tensorboard", logging_dir=folder, purge_step=purge_step)


def _wandb(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    return tracking.WandBTracker(project, name=folder.name, dir=folder, config=settings, mode=_wandb_mode())


def _trackio(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    return tracking.TrackioTracker(project, name=folder.name, config=settings)


def _mlflow(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    return tracking.MLflowTracker(project, run_name=folder.name)


def _comet(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    import comet_ml

    online = "COMET_API_KEY" in os.environ
    config = comet_ml.ExperimentConfig(name=folder.name, offline_directory=str(folder))
    return tracking.CometMLTracker(project, online=online, experiment_config=config)


def _swanlab(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    mode = os.environ.get("SWANLAB_MODE") or ("cloud" if "SWANLAB_API_KEY" in os.environ else "local")
    return tracking.SwanLabTracker(
        project, experiment_name=folder.name, logdir=str(folder / "swanlab"), config=settings, mode=mode
    )


def _aim(tracking: Any, folder: Path, project: str, settings: Any, after: int | None) -> GeneralTracker:
    return tracking.AimTracker(folder.name, logging_dir=str(folder.parent), experiment=project)


def _wandb_mode() -> str:
    """online, offline or disabled: a run is never stopped for a login, so online only where one is arranged for."""
    if os.environ.get("WANDB_MODE"):
        return os.environ["WANDB_MODE"]
    if "WANDB_API_KEY" in os.environ:
        return "online"
    return "offline"


# --- an evaluation ----------------------------------------------------------------------------------------------------


def evaluation_numbers(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`eval/TASK/METRIC` -> value of rows of eval.csv; ends of the interval and the bare LLM's value have names behind.

    Signs that a tracker refuses in a name become `_`.
    """
    numbers = {}
    for row in rows:
        name = re.sub(r"[^A-Za-z0-9_\-/ ]", "_", f"eval/{row['task']}/{row['metric']}")
        values = {"": row["value"], "_ci_low": row.get("ci_low"), "_ci_high": row.get("ci_high"),
                  "_bare": row.get("bare")}
        for behind, value in values.items():
            value = plain(value)
            if value is not None:
                numbers[name + behind] = float(value)
    return numbers


def answer_rows(lines: Sequence[Mapping[str, Any]]) -> list[list[Any]]:
    """Up to `ROWS` lines of predictions.jsonl as rows of `COLUMNS`, of each task as many."""
    rows = []
    for item in spread([item_of(line) for line in lines], ROWS):
        texts = [item.question, item.gold, item.text]
        rows.append([item.task, *("" if text is None else str(text) for text in texts), item.score, item.bare or ""])
    return rows


def log_answers(tracker: GeneralTracker, rows: Sequence[Sequence[Any]], step: int) -> None:
    """A table of `answer_rows` by the tracker's own means; as a Markdown text where it has no tables."""
    if tracker.name == "wandb":
        tracker.log_table(TABLE, columns=list(COLUMNS), data=list(map(list, rows)), step=step)
    elif tracker.name in TABLES:
        TABLES[tracker.name](tracker, rows, step)
    else:
        tracker.log({TABLE: markdown(rows)}, step=step)


def _mlflow_table(tracker: Any, rows: Sequence[Sequence[Any]], step: int) -> None:
    import mlflow

    columns = {name: list(column) for name, column in zip(COLUMNS, zip(*rows, strict=True), strict=True)}
    mlflow.log_table(columns, artifact_file=f"{TABLE}/step-{step:08d}.json")


def _comet_table(tracker: Any, rows: Sequence[Sequence[Any]], step: int) -> None:
    tracker.tracker.log_table(f"{TABLE}-step-{step:08d}.csv", tabular_data=list(rows), headers=list(COLUMNS))


def _trackio_table(tracker: Any, rows: Sequence[Sequence[Any]], step: int) -> None:
    import pandas
    import trackio

    tracker.log({TABLE: trackio.Table(dataframe=pandas.DataFrame(list(rows), columns=list(COLUMNS)))}, step=step)


def _swanlab_table(tracker: Any, rows: Sequence[Sequence[Any]], step: int) -> None:
    import swanlab

    tracker.log({TABLE: swanlab.Text(markdown(rows))}, step=step)


def _aim_table(tracker: Any, rows: Sequence[Sequence[Any]], step: int) -> None:
    import aim

    tracker.log({TABLE: aim.Text(markdown(rows))}, step=step)


TABLES: dict[str, Callable[[Any, Sequence[Sequence[Any]], int], None]] = {
    "mlflow": _mlflow_table,
    "comet_ml": _comet_table,
    "trackio": _trackio_table,
    "swanlab": _swanlab_table,
    "aim": _aim_table,
}


def markdown(rows: Sequence[Sequence[Any]]) -> str:
    """Rows of `COLUMNS` as a table in Markdown, each cell on one line and its text as it is."""
    lines = [COLUMNS, ["---"] * len(COLUMNS), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    """A cell of a table in Markdown, in which no sign of a text is markup."""
    return re.sub(r"([\\`*\[\]<>|_#$])", r"\\\1", " ".join(str(value).split()))
