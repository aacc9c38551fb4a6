"""What a run of the add-on does at the loop's occasions: alarms of the halting head, levels of the curriculum."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from addon.halting import HaltingAlarm, evaluation_collapse
from addon.items import AddonData
from addon.streams import beyond_reserve
from engine.machine import Machine
from engine.report import Report
from engine.system import Hooks
from evaluation import solved_rate


class AddonHooks(Hooks):
    """Alarms of the halting head, and the levels of the curriculum, which `extra` keeps.

    `most_segments` is what an evaluation may use, for the alarm; 0 where halting is not to be judged. `trains` is False
    for the bare LLM.
    """

    def __init__(self, data: AddonData, machine: Machine, most_segments: int, trains: bool):
        self.data = data
        super().__init__()
        self.machine = machine
        self.most_segments = most_segments
        self.trains = trains
        self.halting_alarm = HaltingAlarm()

    @property
    def extra(self) -> dict[str, Any]:
        """What a checkpoint keeps: the curriculum's levels, and what the clock decided when items were drawn."""
        draws = self.data.draw_record()
        return self._extra | ({"draws": draws} if draws else {})

    @extra.setter
    def extra(self, values: dict[str, Any]) -> None:
        self._extra = {name: value for name, value in values.items() if name != "draws"}

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """A halting head that stops everything, or nothing, in training."""
        alarm = self.halting_alarm.update(step, metrics)
        if alarm is None:
            return []

        return [alarm]

    def after_evaluation(self, step: int, report: Report, share: float | None) -> None:
        """Says when halting has collapsed; raises levels while there is training left to use them."""
        if share is None:
            return

        # Halting that took all segments everywhere, or one, has nothing left to choose.
        evaluation = report.details
        if self.most_segments:
            segments = [answer.segments for answer in evaluation.answers]
            alarm = evaluation_collapse(segments, self.most_segments, evaluation.solved_rate())
            if alarm:
                self.machine.say(f"WARNING: step {step}: {alarm}")

        # The last evaluation raises nothing: nobody would train at the new level.
        curriculum = self.data.curriculum
        if not curriculum:
            return
        if share < 1:
            rates = {}
            for name in curriculum.levels:
                rates[name] = solved_rate(curriculum.judged(name, evaluation.of(name)))
            if curriculum.update(rates):
                self.machine.say(f"step {step}: curriculum goes up to level {curriculum.summary()}")
                self.data.to_levels()
        self.extra = {"curriculum": dict(curriculum.levels)}

    def ended_early(self) -> str | None:
        """The bare LLM is only evaluated."""
        if self.trains:
            return None
        return "the bare LLM has nothing to train"

    def restored(self, before: Mapping[str, Any]) -> list[str]:
        """Goes to the checkpoint's levels; notes evaluation items that its run may have trained on."""
        # Before the data go to their position, which counts the items of these levels.
        curriculum = self.data.curriculum
        if curriculum and "curriculum" in self.extra:
            levels = dict(curriculum.levels)
            curriculum.restore(self.extra["curriculum"])
            if curriculum.levels != levels:
                self.data.to_levels()

        # The checkpoint says what it was trained on, and none of that is evaluated.
        config = self.data.config
        if self.data.trained.is_whole:
            return []

        # An older checkpoint's run kept off its own held-out items alone.
        same = all(getattr(config, name) == before.get(name) for name in ("eval_seed", "task_config"))
        reserved = before.get("eval_n", 0)
        if same and config.eval_n <= reserved:
            return []
        names = [task.name for task in self.data.tasks]
        return beyond_reserve(names, reserved, before.get("group_split", False))
