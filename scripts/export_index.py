"""The model-index of a card: what was solved, as entries that the hub shows, one for each task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from evaluation import OVERALL
from tasks.built_in import BUILT_IN


@dataclass(frozen=True)
class TaskNames:
    """Which tasks of a run are neither Reasoning Gym's nor built in.

    data: the task that --data became; None = there were no own data.
    plugin: the tasks of --plugin.
    """

    data: str | None = None
    plugin: tuple[str, ...] = ()

    def kind(self, task: str) -> tuple[str, str]:
        """(type, name for people) of the data set whose items a task asks."""
        if task == OVERALL:
            return "mixture", "all tasks together"
        if task == self.data:
            return "own-data", f"own data {task}"
        if task in self.plugin:
            return "own-task", f"own task {task}"
        if task in BUILT_IN:
            return "built-in-task", f"built-in task {task}"
        return "reasoning-gym", f"Reasoning Gym {task}"


def eval_results(rates: Sequence[Mapping[str, str]], names: TaskNames, protocol: str = "") -> list[Any]:
    """Results for huggingface_hub's ModelCardData; rates of the same task make one entry.

    `rates` are rows of eval.csv. `protocol` names how they were measured; "" = as the run measures itself.
    """
    from huggingface_hub import EvalResult

    behind = f"; {protocol}" if protocol else ""
    results = []
    for row in rates:
        kind, name = names.kind(row["task"])

        # The hub's library joins results of the same type and config.
        results.append(EvalResult(
            task_type="text-generation",
            dataset_type=kind,
            dataset_name=name,
            dataset_config=row["task"],
            metric_type=row["metric"],
            metric_value=round(float(row["value"]), 5),
            metric_name=f"{row['metric']} (n = {row['n']}{behind})",
        ))
    return results
