"""The items of a run of the add-on: what is held out to be evaluated, and the batches that train."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from addon.curriculum import ENOUGH, Curriculum, CurriculumConfig
from addon.draws import DrawProgress, Draws, agreed
from addon.streams import EpochStream, TrainStream, training_examples
from addon.train_batches import TrainBatches
from batching import Batch, PromptFormat, places_of
from engine.machine import Machine
from engine.progress import clock_text
from evaluation import answer_budget
from options import names
from own_tasks.choice import mix_weights, tasks_with_own
from own_tasks.table import OwnDataConfig
from own_tasks.task import OwnTask
from reasoning_gym_wrapper import Example, Reserve, Task, make_tasks
from tasks.chance import Chance, task_chances
from tasks.limits import USUAL, JudgeConfig
from text_data.trained import TrainedQuestions

PROBE = 256  # items of an endless stream that are measured against --max_seq_len before training
PROBE_S = 60.0  # seconds that this may take


@dataclass(frozen=True)
class AddonDataConfig:
    """The items of a run of the add-on; each field but `tasks`, `own` and `limits` is the flag of its name.

    tasks: names of the tasks.
    task_config: their difficulty: small, default, a JSON object or its file.
    own: the user's own data, a task beside them.
    mix: shares of the tasks in training, NAME=WEIGHT,...; None = equal parts.
    eval_n: held-out items of each task (of each level, with a curriculum).
    eval_seed: seed of the held-out items.
    group_split: True holds out whole groups of like items, where a task knows groups.
    train_n: size of the fixed training set; 0 = fresh items without end.
    seed: seed of the training items and their order.
    overlong: error or drop, for items longer than the prompt format allows.
    batch_size: items of a micro-batch of one process.
    batch_tokens: most tokens of a micro-batch of one process, in place of `batch_size` examples; 0 = off.
    bucket_batches: batches whose items are drawn together and sorted by length.
    grad_accum_steps: micro-batches of a batch.
    max_new_tokens: longest answer; 0 = the longest held-out target and a margin.
    curriculum: True lets each task climb its levels.
    curriculum_threshold: solved share from which a task goes up.
    curriculum_levels: highest level; 0 = the last.
    eval_only: True opens no training stream.
    curriculum_draw_s: seconds that drawing one level's questions may take; 0 = no limit.
    resume: the checkpoint asked for; None for a new run, or one that goes on by its name.
    reserve_tasks: comma list of tasks whose evaluation items are set aside for a later stage, or None.
    reserve_config: their difficulty; None = `task_config`.
    limits: how long an item may take to make, and an answer to score.
    """

    tasks: Sequence[str]
    task_config: str
    own: OwnDataConfig = OwnDataConfig()
    mix: str | None = None
    eval_n: int = 256
    eval_seed: int = 10**9
    group_split: bool = True
    train_n: int = 0
    seed: int = 0
    overlong: str = "error"
    batch_size: int = 64
    bucket_batches: int = 1
    batch_tokens: int = 0
    grad_accum_steps: int = 1
    max_new_tokens: int = 0
    curriculum: bool = False
    curriculum_threshold: float = 0.8
    curriculum_levels: int = 0
    curriculum_draw_s: float = 60.0
    eval_only: bool = False
    resume: str | None = None
    reserve_tasks: str | None = None
    reserve_config: str | None = None
    limits: JudgeConfig = USUAL


class AddonData:
    """Held-out items to evaluate on, and the training batches unless --eval_only.

    With a curriculum both change when a task goes up a level. `trained` records the questions that are trained on, and
    knows those of earlier stages, which are not evaluated.

    Raises:
        ValueError: an item too long, a task that cannot be trained on, too few items.
    """

    def __init__(
        self, config: AddonDataConfig, prompt_format: PromptFormat, machine: Machine, draws: Draws | None = None,
        trained: TrainedQuestions | None = None,
    ):
        self.config = config
        self.trained = trained or TrainedQuestions()
        self.format = prompt_format
        self.machine = machine

        # What is evaluated is drawn first, so that training keeps off it.
        self.tasks = tasks_with_own(config.tasks, config.task_config, config.own, config.limits)
        self.own = next((task for task in self.tasks if isinstance(task, OwnTask)), None)
        self.draws = draws or Draws()
        self._chances: dict[str, Chance] = {}
        self._chances_of: list[Example] | None = None  # the items that `_chances` are of
        self.curriculum: Curriculum | None = None
        agreed(self._keep_off, machine, self)
        self._tell_left_out()
        self.budget = answer_budget(self.format, self.held_out, config.max_new_tokens)

        self.before_first: Callable[[], None] | None = None  # what is done once before the first batch
        # Training items keep off all that is held out.
        self.batches: TrainBatches | None = None if config.eval_only else self._batches(self._stream())

    def _keep_off(self) -> None:
        """Draws all that training keeps off."""
        self._hold_out()
        if self.config.reserve_tasks:
            self._set_aside(self.config.reserve_tasks)

    def _hold_out(self) -> None:
        """Draws the evaluation items."""
        config = self.config
        if config.curriculum:
            self.curriculum = self._curriculum()
            self.tasks = self.curriculum.tasks()
            self.reserve = self.curriculum.reserve
            self.eval_examples = self.curriculum.examples()
            return

        tell = DrawProgress("drawing evaluation items of {task} (--eval_n)", config.eval_n, self.machine.say)
        with self.draws.clock(self.tasks):
            self.reserve = Reserve(
                self.tasks, config.eval_n, config.eval_seed, by_group=config.group_split, tell=tell,
                trained=self.trained,  # own ones too: the user's data may have changed since the run began
            )
        self.eval_examples = self.fitting(self.reserve.examples)

    def _tell_left_out(self) -> None:
        """Says how many questions are not evaluated because an earlier stage has trained on them."""
        for name, count in self.reserve.passed_over.items():
            self.machine.say(
                f"{name}: {count} evaluation questions are left out, since the checkpoint was trained on them; the "
                "next ones take their places"
            )

    def _set_aside(self, reserved: str) -> None:
        """Keeps training off the items that a later stage will evaluate."""
        config = self.config
        tasks = make_tasks(names(reserved), config.reserve_config or config.task_config, config.limits)
        tell = DrawProgress("drawing items of {task} (--reserve_tasks)", config.eval_n, self.machine.say)

        # A stage on these tasks draws by the same rule, so it meets the same items.
        with self.draws.clock(tasks):
            later = Reserve(
                tasks, config.eval_n, config.eval_seed, must_fill=False, by_group=config.group_split, tell=tell,
                trained=self.trained,
            )
        self.reserve.questions |= later.questions
        self.machine.say(
            f"--reserve_tasks {reserved}: {len(later.questions)} questions are set aside for a later stage"
        )

    def draw_record(self) -> dict[str, Any]:
        """What the clock has decided so far, for the checkpoint; empty where it decided nothing."""
        self.draws.note(self._all_tasks())
        return self.draws.document()

    def _all_tasks(self) -> list[Task]:
        """The tasks, at every level of a curriculum."""
        if self.curriculum:
            return [step for steps in self.curriculum.ladders.values() for step in steps]
        return self.tasks

    @property
    def held_out(self) -> list[Example]:
        """The items of every evaluation of this run, alike on every rank and at every level."""
        if self.curriculum:
            return self.reserve.examples
        return self.eval_examples

    def chances(self) -> dict[str, Chance]:
        """Task -> what the best constant answer solves of the items evaluated now; searched once for these items."""
        if self._chances_of is not self.eval_examples:
            self._chances = task_chances(self.eval_examples)
            self._chances_of = self.eval_examples
        return self._chances

    def left_out_notes(self) -> list[str]:
        """One clause for each task that has drawn items with a gold answer that fails its own verifier."""
        notes = []
        for task in self.tasks:
            if task.left_out:
                drawn = f"{task.name}: {len(task.left_out)} drawn items"
                notes.append(f"{drawn} left out, their gold answer fails its own verifier")
        return notes

    @property
    def fixed_examples(self) -> list[Example]:
        """The items of a fixed training set (--train_n above 0)."""
        return self.batches.stream.examples

    def fitting(self, examples: list[Example], what: str = "evaluation") -> list[Example]:
        """The items that are short enough. Raises ValueError where --overlong error forbids to drop any."""
        return fitting_rows(self.format, examples, self.config.overlong, what, self.machine)

    def _stream(self) -> TrainStream | EpochStream:
        """The training items. Those without end are probed for length before anything is trained."""
        # An item that one process alone passes over would part the processes.
        config = self.config
        if self.machine.world > 1:
            for task in self._all_tasks():
                task.most_slow = 1
        weights = mix_weights(config.mix, [task.name for task in self.tasks])
        stream = training_examples(self.tasks, self.reserve, config.seed, config.train_n, weights)
        if isinstance(stream, EpochStream):
            tell_of_few_rows(self.tasks, config.train_n, len(stream.examples), self.machine)
            stream.examples = self.fitting(stream.examples, "training")
            return stream

        # The probe draws from a stream of its own: the training stream must begin at its first item.
        probe = training_examples(self.tasks, self.reserve, config.seed, 0, weights)
        drawn: list[Example] = []
        began = time.monotonic()
        while len(drawn) < PROBE and (not drawn or time.monotonic() - began < PROBE_S):
            drawn.append(next(probe))
        self.fitting(drawn, "training")

        # Where making items is slow, it is what training will wait for.
        if len(drawn) < PROBE:
            each = (time.monotonic() - began) / len(drawn)
            batch = config.batch_size * config.grad_accum_steps * self.machine.world
            self.machine.say(
                f"WARNING: making a training item takes {each:.2g} s, so a batch of {batch} takes "
                f"{clock_text(each * batch)}: choose an easier --task_config, or a small --train_n"
            )
        return stream

    def _batches(self, stream: TrainStream | EpochStream) -> TrainBatches:
        """Batches of the stream's items for this rank."""
        config = self.config

        # A curriculum climbs unattended: a level's rare long item must not end the run.
        overlong = "drop" if self.curriculum else config.overlong
        return TrainBatches(
            stream,
            self.format,
            config.batch_size,
            config.bucket_batches,
            config.seed,
            overlong,
            self.machine.rank,
            self.machine.world,
            config.batch_tokens,
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
            config.curriculum_draw_s,
        )
        curriculum = Curriculum(
            self.tasks, levels, self.fitting, self.draws, self.machine.say, self.trained.earlier
        )

        # A run that goes on stands at its checkpoint's levels, not at these.
        for name, level in curriculum.starts.items():
            if level and not (config.resume or config.eval_only):
                reason = f"the first of {ENOUGH:,} questions or more"
                if name in self.draws.levels:
                    reason = "the first that does not repeat its questions"
                self.machine.say(f"curriculum: {name} begins at level {level}, {reason}")
        return curriculum

    def to_levels(self) -> None:
        """Evaluation items and training stream of the curriculum's levels; the stream goes on at its position."""
        self.tasks = self.curriculum.tasks()
        self.eval_examples = self.curriculum.examples()

        # The number of items drawn so far stays the position: which they were differs by level anyway.
        if self.batches:
            weights = mix_weights(self.config.mix, [task.name for task in self.tasks])
            stream = training_examples(self.tasks, self.reserve, self.config.seed, 0, weights)
            stream.load_state_dict(self.batches.stream.state_dict())
            padding = self.batches.padding
            self.batches = self._batches(stream)
            self.batches.padding = padding

    # --- what the loop asks, see `engine.system.Data` ---

    @property
    def size(self) -> int:
        return len(self.fixed_examples)

    def next_batches(self) -> list[Batch]:
        if self.before_first:
            self.before_first()
        self.before_first = None
        batches = []
        for _ in range(self.config.grad_accum_steps):
            batches += [part.to(self.machine.device) for part in self.batches.parts()]

            # What the other processes train on, too: the main one's record is kept.
            for example in self.batches.latest:
                self.trained.add(example.question)
        return batches

    def state(self) -> dict[str, Any]:
        return self.batches.state_dict()

    def load_state(self, state: dict[str, Any]) -> None:
        self.batches.load_state_dict(state)

    def documents(self) -> dict[str, str]:
        return self.trained.documents()

    def describe(self, batches: list[Batch]) -> list[dict[str, Any]]:
        described = []
        for batch in batches:
            for example in batch.examples:
                described.append({"task": example.task, "question": example.question, "target": example.target})
        return described


def tell_of_few_rows(tasks: Sequence[Task], n: int, rows: int, machine: Machine) -> None:
    """Says where --train_n asks for more than the `rows` that own data have to train on."""
    is_own = len(tasks) == 1 and isinstance(tasks[0], OwnTask) and tasks[0].is_fixed

    if is_own and rows < n:
        machine.say(f"WARNING: --train_n {n}: {tasks[0].name} has {rows} rows to train on, and trains on all of them")


def fitting_rows(
    prompt_format: PromptFormat, examples: list[Example], overlong: str, what: str, machine: Machine
) -> list[Example]:
    """As `PromptFormat.fitting`; says which rows of own data are left out."""
    kept = prompt_format.fitting(examples, overlong, what)
    short = {id(example) for example in kept}
    places = places_of(example for example in examples if id(example) not in short)

    if places:
        machine.say(f"WARNING: {len(examples) - len(kept)} of {len(examples)} {what} examples are longer than "
                    f"--max_seq_len {prompt_format.max_seq_len} tokens and left out, among them {places}")
    return kept
