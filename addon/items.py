"""The items of a run of the add-on: what is held out to be evaluated, and the batches that train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from addon.curriculum import ENOUGH, Curriculum, CurriculumConfig
from batching import Batch, EpochStream, PromptFormat, TrainBatches, TrainStream, training_examples
from engine.machine import Machine
from evaluation import answer_budget
from reasoning_gym_wrapper import Example, Reserve, make_tasks
from tasks.limits import USUAL, TimeLimits

PROBE = 256  # items of an endless stream that are measured against --max_seq_len before training


@dataclass(frozen=True)
class AddonDataConfig:
    """The items of a run of the add-on; each field but `tasks` is the flag of its name.

    tasks: names of the tasks.
    task_config: their difficulty: small, default, a JSON object or its file.
    eval_n: held-out items of each task (of each level, with a curriculum).
    eval_seed: seed of the held-out items.
    group_split: True holds out whole groups of like items, where a task knows groups.
    train_n: size of the fixed training set; 0 = fresh items without end.
    seed: seed of the training items and their order.
    overlong: error or drop, for items longer than the prompt format allows.
    batch_size: items of a micro-batch of one process.
    bucket_batches: batches whose items are drawn together and sorted by length.
    grad_accum_steps: micro-batches of a batch.
    max_new_tokens: longest answer; 0 = the longest held-out target and a margin.
    curriculum: True lets each task climb its levels.
    curriculum_threshold: solved share from which a task goes up.
    curriculum_levels: highest level; 0 = the last.
    eval_only: True opens no training stream.
    resume: the checkpoint asked for; None for a new run, or one that goes on by its name.
    limits: how long an item may take to make, and an answer to score.
    """

    tasks: Sequence[str]
    task_config: str
    eval_n: int = 256
    eval_seed: int = 10**9
    group_split: bool = True
    train_n: int = 0
    seed: int = 0
    overlong: str = "error"
    batch_size: int = 64
    bucket_batches: int = 1
    grad_accum_steps: int = 1
    max_new_tokens: int = 0
    curriculum: bool = False
    curriculum_threshold: float = 0.8
    curriculum_levels: int = 0
    eval_only: bool = False
    resume: str | None = None
    limits: TimeLimits = USUAL


class AddonData:
    """Held-out items to evaluate on, and the training batches unless --eval_only.

    With a curriculum both change when a task goes up a level.

    Raises:
        ValueError: an item too long, a task that cannot be trained on, too few items.
    """

    def __init__(self, config: AddonDataConfig, prompt_format: PromptFormat, machine: Machine):
        self.config = config
        self.format = prompt_format
        self.machine = machine

        # What is evaluated is drawn first, so that training keeps off it.
        self.tasks = make_tasks(config.tasks, config.task_config, config.limits)
        self.curriculum: Curriculum | None = None
        if config.curriculum:
            self.curriculum = self._curriculum()
            self.tasks = self.curriculum.tasks()
            self.reserve = self.curriculum.reserve
            self.eval_examples = self.curriculum.examples()
        else:
            self.reserve = Reserve(self.tasks, config.eval_n, config.eval_seed, by_group=config.group_split)
            self.eval_examples = self.fitting(self.reserve.examples)
        self.budget = answer_budget(self.format, self.held_out, config.max_new_tokens)

        # Training items keep off all that is held out.
        self.batches: TrainBatches | None = None
        if not config.eval_only:
            self.batches = self._batches(self._stream())

    @property
    def held_out(self) -> list[Example]:
        """The items of every evaluation of this run, alike on every rank and at every level."""
        if self.curriculum:
            return self.reserve.examples
        return self.eval_examples

    @property
    def fixed_examples(self) -> list[Example]:
        """The items of a fixed training set (--train_n above 0)."""
        return self.batches.stream.examples

    def fitting(self, examples: list[Example], what: str = "evaluation") -> list[Example]:
        """The items that are short enough. Raises ValueError where --overlong error forbids to drop any."""
        return self.format.fitting(examples, self.config.overlong, what)

    def _stream(self) -> TrainStream | EpochStream:
        """The training items. Those without end are probed for length before anything is trained."""
        config = self.config
        stream = training_examples(self.tasks, self.reserve, config.seed, config.train_n)
        if isinstance(stream, EpochStream):
            stream.examples = self.fitting(stream.examples, "training")
            return stream

        # The probe draws from a stream of its own: the training stream must begin at its first item.
        probe = training_examples(self.tasks, self.reserve, config.seed, 0)
        self.fitting([next(probe) for _ in range(PROBE)], "training")
        return stream

    def _batches(self, stream: TrainStream | EpochStream) -> TrainBatches:
        """Batches of the stream's items for this rank."""
        config = self.config

        # A curriculum climbs unattended: a level's rare long item must not end the run.
        overlong = config.overlong
        if self.curriculum:
            overlong = "drop"

        return TrainBatches(
            stream,
            self.format,
            config.batch_size,
            config.bucket_batches,
            config.seed,
            overlong,
            self.machine.rank,
            self.machine.world,
        )

    # --- curriculum ---

    def _curriculum(self) -> Curriculum:
        """The levels of every task with their held-out items; says where a task cannot begin at the first."""
        config = self.config
        levels = CurriculumConfig(
            config.curriculum_threshold,
            config.curriculum_levels,
            config.eval_n,
            config.eval_seed,
            config.group_split,
        )
        curriculum = Curriculum(self.tasks, levels, self.fitting)

        # A run that goes on stands at its checkpoint's levels, not at these.
        for name, level in curriculum.starts.items():
            if level and not (config.resume or config.eval_only):
                self.machine.say(
                    f"curriculum: {name} begins at level {level}, the first of {ENOUGH:,} questions or more"
                )
        return curriculum

    def to_levels(self) -> None:
        """Evaluation items and training stream of the curriculum's levels; the stream goes on at its position."""
        self.tasks = self.curriculum.tasks()
        self.eval_examples = self.curriculum.examples()

        # The number of items drawn so far stays the position: which they were differs by level anyway.
        if self.batches:
            stream = training_examples(self.tasks, self.reserve, self.config.seed, 0)
            stream.load_state_dict(self.batches.stream.state_dict())
            self.batches = self._batches(stream)

    # --- what the loop asks, see `engine.system.Data` ---

    @property
    def size(self) -> int:
        return len(self.fixed_examples)

    def next_batches(self) -> list[Batch]:
        return [next(self.batches).to(self.machine.device) for _ in range(self.config.grad_accum_steps)]

    def state(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def describe(self, batches: list[Batch]) -> list[dict[str, Any]]:
        described = []
        for batch in batches:
            for example in batch.examples:
                described.append({"task": example.task, "question": example.question, "target": example.target})
        return described
