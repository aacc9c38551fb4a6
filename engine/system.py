"""What a system hands to the loop; engine/loop.py says how the parts meet."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import nn

from engine.machine import MachineConfig
from engine.nonfinite import NonFiniteConfig
from engine.patience import PatienceConfig
from engine.report import Card, Report
from engine.schedule import ScheduleConfig


@dataclass(frozen=True, kw_only=True)
class LoopConfig(MachineConfig, ScheduleConfig, PatienceConfig, NonFiniteConfig):
    """The flags of the loop, those of `MachineConfig` and the other three among them.

    `options.part(LoopConfig, opts, ...)` makes one.

    settings: text of config.resolved.yaml, which alone reruns the run.
    flags: every flag by name, for trackers and for comparing with a checkpoint's.
    explicit: names of the flags that the user set.
    max_steps: batches of the whole run; 0 = `epochs` or `max_minutes` limit it.
    epochs: passes over `Data.size` items; 0 = no limit.
    max_minutes: minutes of training and evaluation, those before a resume included; 0 = no limit.
    fit_minutes: minutes of training that a new run chooses its steps for, at most `max_steps`; None, 0 = it does not.
    batch_size: items of a micro-batch of one process.
    batch_tokens: most tokens of one, in place of so many items; 0 = off.
    grad_accum_steps: micro-batches of a batch, in each process.
    warmup_steps: batches over which the learning rate rises; at most half of the run.
    log_steps: batches from one line of metrics.jsonl to the next, at least 1.
    eval_every, save_every, log_samples_every: batches from one to the next; 0 = never while training.
    save_best_model: mark the checkpoint of the highest `Report.value`, which rotation keeps.
    checkpoint_limit: newest checkpoints to keep; 0 = all.
    report: write report.html at the end.
    """

    settings: str
    flags: Mapping[str, Any]
    explicit: Collection[str] = ()
    max_steps: int = 1900
    epochs: int = 0
    max_minutes: float = 0.0
    fit_minutes: float | None = None
    batch_size: int = 64
    batch_tokens: int = 0
    grad_accum_steps: int = 1
    warmup_steps: int = 50
    log_steps: int = 20
    eval_every: int = 380
    save_every: int = 0
    log_samples_every: int = 0
    save_best_model: bool = False
    checkpoint_limit: int = 3
    report: bool = True

    def batch_words(self) -> str:
        """What a micro-batch has: `64 examples`, `at most 2048 tokens`."""
        return f"at most {self.batch_tokens} tokens" if self.batch_tokens else f"{self.batch_size} examples"


class Data(Protocol):
    """The training batches of this process. With --eval_only nothing but the constructor is called."""

    @property
    def size(self) -> int:
        """Items of one epoch; asked only when --epochs limits the run."""

    def next_batches(self) -> list[Any]:
        """The micro-batches of the next batch, on the device.

        Raises:
            ValueError: a bad line; the loop saves what was trained and ends.
        """

    def state(self) -> dict[str, Any]:
        """The position in the training items, JSON-able."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` returned."""

    def documents(self) -> dict[str, str]:
        """File name -> text of what a checkpoint keeps of the items: which questions were trained on."""

    def describe(self, batches: list[Any]) -> list[dict[str, Any]]:
        """Every example of `batches`, readable and JSON-able, for the record of a bad batch."""


class Evaluator(Protocol):
    """Measures the weights as they are: it applies the averaged ones itself and puts them back."""

    def evaluate(self, step: int) -> Report:
        """The whole evaluation. Every process calls it; the main one's report is written."""

    def samples(self, turn: int) -> list[str]:
        """A few evaluation items with what the model answers, each as text, others each `turn` (1, 2, ...)."""

    def before_training(self) -> Report | None:
        """What to write down of the untrained model, called once before step 1; None for nothing."""
        return None


class Hooks:
    """What a system does at the loop's occasions. A subclass overrides what it needs; nothing happens by default.

    `extra` is what a checkpoint keeps for the system: JSON-able, empty in a new run.
    """

    def __init__(self) -> None:
        self.extra: dict[str, Any] = {}

    def alarms(self, step: int, metrics: Mapping[str, float]) -> list[str]:
        """What the user should know of the last batch at once, one line each."""
        return []

    def shown(self, metrics: Mapping[str, float]) -> dict[str, str]:
        """Further fields of the progress line."""
        return {}

    def after_evaluation(self, step: int, report: Report, share: float | None) -> None:
        """After each evaluation, before anything is saved.

        `share` in 0..1 is how much of the run is done; None when this is no evaluation amid training: the closing one,
        or that of --eval_only.
        """

    def ended_early(self) -> str | None:
        """Why training ends before its limit, in words. Patience that is used up is the loop's own reason."""

    def nothing_to_do(self, step: int, total_steps: int | None, share: float, early: str | None) -> str | None:
        """What to say behind the folder's name when not even the closing evaluation is left ("" for nothing).

        `early` is why training has ended before its limit. None: the run goes on.
        """

    def restored(self, before: Mapping[str, Any]) -> list[str]:
        """After weights and `extra` of a checkpoint are back, before the data go to their position.

        `before` has the checkpoint's flags by name. Returns notes for the user.
        """
        return []


@dataclass(frozen=True)
class Facts:
    """Names and figures of a system that stay the same for the whole run."""

    label: str  # begins the name of an unnamed run's folder
    introduction: str  # the first line: model and data
    card: Card  # README.md of the checkpoints
    metric: str = "solved"  # name of `Report.value` in best.json
    unit: str = "ex"  # of the progress line's rate
    parts: Mapping[str, nn.Module] = field(default_factory=dict)  # whose parameters --dry_run counts
    segments: float = 1.0  # segments of an average batch, whose time --dry_run measures one by one
    dry_run_step: int = 0  # batch number that --dry_run tries: one that costs as much as most
    saves_every_evaluation: bool = False
    compare: bool = True  # whether the closing hint shows `generate.py --compare`
    next_stage: str = ""  # in place of the closing hints where another stage follows; may hold {step}
