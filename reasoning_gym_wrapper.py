"""Reasoning Gym tasks as `Example`s: question, target, verifier, task.

Evaluation items are drawn and deduplicated first; every source of training text rejects their questions
(`addon.streams.TrainStream`, and `scripts/pretrain_host.py` for the embedded LLM). Items of one data set are drawn with
`Random(seed + index)`, so neighbouring seeds share almost all of their items: training and evaluation seeds stay 10
million and more apart, and because small tasks collide all the same, questions are compared as normalised text as well.
Where a task has few solutions (`GROUPS`), items are split by solution too: a fixed share of the solutions is for
evaluation alone.
"""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import os
import random
import sys
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engine.files import read_text
from engine.records import normalise
from engine.time_limit import TimeLimitError, call_within
from tasks.built_in import BUILT_IN
from tasks.limits import USUAL, JudgeConfig
from tasks.plugins import PLUGINS, published_tasks
from verify.judge import Verdict, gold_fails, verdict

EVAL_SEED = 10**9  # training seeds are folded below 9 * 10^8, see `train_seed`
SUMS = 256  # built-in sums where no number is asked for
SEED_GAP = 10**7  # between the data seeds of two runs; a run draws fewer items of a task
CHUNK = 500  # items of one data set object; some tasks cannot be indexed past their size
MAX_REJECTED = 5_000  # consecutive rejected draws that end a search for new questions
MAX_SLOW = 3  # consecutive draws that ran out of time and end a task
DEFAULT_TASKS = ("chain_sum", "basic_arithmetic")

# `--task_config small`: applied where a task's config has the field, the task's own defaults otherwise.
SMALL_FIELDS = {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2}

_SCORER = "its scorer evaluates the model's answer as Python"
EXECUTES_CODE = {
    "codeio": "it runs generated programs to make its items",
    **dict.fromkeys(("string_insertion", "spiral_matrix", "binary_matrix", "n_queens"), _SCORER),
    **dict.fromkeys(("simple_integration", "intermediate_integration", "polynomial_multiplication"), _SCORER),
    **dict.fromkeys(("puzzle24", "countdown"), _SCORER),
}
NO_GOLD = frozenset({"graph_color", "rubiks_cube", "boxnet", "rush_hour", "propositional_logic"})
SCORES_ANYTHING = frozenset({"game_of_life_halting"})
GLOBAL_RANDOM = frozenset({"list_functions"})  # draws from Python's global generator as well as from its own
HASH_DEPENDENT = frozenset(
    {"isomorphic_strings", "knight_swap", "polynomial_multiplication", "ransom_note", "word_ladder"}
)

# What items of a task share though questions differ: there are 288 solved 4x4 grids, easily known by heart.
GROUPS: dict[str, Callable[[dict[str, Any]], str]] = {"mini_sudoku": lambda entry: " ".join(entry["answer"].split())}
GROUP_SHARE = 5  # one group in so many is for evaluation


class TaskError(ValueError):
    """A task or its configuration cannot be used; the message is one line for the user."""


@dataclass(frozen=True)
class Example:
    """One question with its gold target (None where the task has none) and the entry its verifier needs."""

    question: str
    target: str | None
    task: str
    entry: dict[str, Any]
    source: Task = dataclasses.field(repr=False, compare=False)

    @property
    def item(self) -> dict[str, Any]:
        """The entry with `item["metadata"]["task"]`; a copy, as calendar_arithmetic's verifier reads its own `task`."""
        return {**self.entry, "metadata": {**self.entry["metadata"], "task": self.task}}

    @property
    def group(self) -> str | None:
        """What this item shares with others of its task beside the question, see `GROUPS`; None for most tasks."""
        return GROUPS[self.task](self.entry) if self.task in GROUPS else None

    def verify(self, answer: str) -> Verdict:
        """Scores generated text with the task's strict rule, unless strictness is off, and its own scorer."""
        limits = getattr(self.source, "limits", USUAL)
        return verdict(self.task, answer.strip(), self.entry, self.source.scorer, limits)


# --- tasks ------------------------------------------------------------------------------------------------------------


def registry() -> dict[str, tuple[type, type]]:
    """Name -> (data set class, config class) of every task at hand; without reasoning-gym built-in and plugins'."""
    tasks = BUILT_IN | published_tasks() | PLUGINS
    tasks.pop("composite", None)
    return tasks


def default_tasks() -> list[str]:
    """The tasks trained when none is named; `toy_add`, loudly, where reasoning-gym is missing."""
    if all(name in registry() for name in DEFAULT_TASKS):
        return list(DEFAULT_TASKS)
    print(
        "WARNING: reasoning-gym is not installed; the built-in toy_add (two-number addition) stands in for "
        f"{', '.join(DEFAULT_TASKS)}. Its figures say nothing about them: pip install reasoning-gym==0.1.25",
        file=sys.stderr,
    )
    return ["toy_add"]


class Task:
    """One task at one difficulty: items by (seed, index), and its scorer.

    `passed_over` has the indices of each seed whose items took too long to make. They stay passed over, however fast
    the machine is next time. `left_out` has the data seeds of the items whose gold answer fails.

    Raises:
        TaskError: unknown name, unknown or illegal config keys.
    """

    def __init__(self, name: str, config: dict[str, Any] | None = None, limits: JudgeConfig = USUAL):
        if name not in registry():
            raise TaskError(unknown_task(name))
        self.name, self.config = name, dict(config or {})
        self.limits = limits
        self.passed_over: dict[int, list[int]] = {}
        self.left_out: set[int] = set()
        self.most_slow = MAX_SLOW  # consecutive draws out of time that end it
        self._dataset_class, self._config_class = registry()[name]
        self.scorer = self._checked_dataset()

    def _checked_dataset(self) -> Any:
        fields = {field.name for field in dataclasses.fields(self._config_class)} - {"seed", "size"}
        unknown = sorted(str(key) for key in self.config if key not in fields)
        if unknown:
            raise TaskError(
                f"task {self.name} has no config field {', '.join(unknown)}: choose from {', '.join(sorted(fields))}"
            )
        try:
            return self._dataset(0)
        except Exception as error:  # noqa: BLE001 - foreign config classes raise what they like
            shown = json.dumps(self.config, default=str)
            raise TaskError(f"task {self.name} refuses the config {shown}: {error}") from error

    def _dataset(self, seed: int) -> Any:
        config = self._config_class(**self.config, seed=seed, size=CHUNK)
        if hasattr(config, "validate"):
            config.validate()
        return self._dataset_class(config)

    def items(self, seed: int, start: int = 0) -> Iterator[tuple[int, Example]]:
        """Endless (index, Example) pairs from index `start`; the same seed and index give the same item.

        An index at which the generator gives up (mazes without a path do), or takes too long, is passed over; so is
        one whose gold answer fails its own verifiers (jugs that no moves fill), unless strictness is off.

        Raises:
            TaskError: it makes no items, or none in time.
        """
        index, failed, slow = start, 0, 0
        while failed < MAX_REJECTED:
            chunk = self._dataset(seed + index // CHUNK * CHUNK)
            for offset in range(index % CHUNK, CHUNK):
                try:
                    entry = self._draw_in_time(chunk, offset, seed, index)
                    self._check_gold(entry, seed + index)
                except TimeLimitError as error:
                    slow += 1
                    if slow >= self.most_slow:
                        raise TaskError(self._too_slow()) from error
                except Exception as error:  # noqa: BLE001 - foreign generators raise what they like
                    failed, reason = failed + 1, error
                else:
                    failed = 0
                    if entry is not None:
                        slow = 0
                        yield index, Example(entry["question"], entry["answer"], self.name, entry, self)
                index += 1
        raise TaskError(f"task {self.name} failed to make {failed} items in a row: {reason}")

    def _draw_in_time(self, chunk: Any, offset: int, seed: int, index: int) -> dict[str, Any] | None:
        """The entry at `index` of `seed`; None where it was passed over before. Raises TimeLimitError, and tells it."""
        slow = self.passed_over.get(seed, [])
        if index in slow:
            return None
        try:
            return call_within(self.limits.draw_timeout_s, self._draw, chunk, offset, seed + index)
        except TimeLimitError:
            self.passed_over[seed] = [*slow, index]
            print(
                f"WARNING: task {self.name}: an item took longer than --draw_timeout_s "
                f"{self.limits.draw_timeout_s:g} to make and is passed over",
                file=sys.stderr,
            )
            raise

    def _check_gold(self, entry: dict[str, Any] | None, seed: int) -> None:
        """Notes an item whose gold answer fails. Raises TaskError."""
        if entry is None or not self.limits.verifier_strict or not gold_fails(self.name, entry, self.scorer):
            return
        self.left_out.add(seed)
        raise TaskError("its gold answer fails its own verifier")

    def _too_slow(self) -> str:
        """What to do where no item comes in time, one line."""
        return (
            f"task {self.name}: {self.most_slow} items in a row took longer than --draw_timeout_s "
            f"{self.limits.draw_timeout_s:g} to make: lower the difficulty with --task_config, raise the limit or "
            "choose another task"
        )

    def _draw(self, chunk: Any, offset: int, seed: int) -> dict[str, Any]:
        if self.name not in GLOBAL_RANDOM:
            return chunk[offset]
        before = random.getstate()
        random.seed(seed)
        try:
            return chunk[offset]
        finally:
            random.setstate(before)


def unknown_task(name: str) -> str:
    """One line that names the three nearest tasks."""
    near = difflib.get_close_matches(name, registry(), n=3, cutoff=0.0)
    has_all = len(registry()) > len(BUILT_IN)
    hint = "" if has_all else " (reasoning-gym is not installed: pip install reasoning-gym==0.1.25)"
    return f"unknown task {name!r}: the nearest names are {', '.join(near)}{hint}"


def read_task_config(text: str, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    """`--task_config` as {task: config}: small, default, a YAML/JSON file or JSON text.

    A mapping whose keys are all names of chosen tasks holds one config per task; any other mapping is for every task.

    Raises:
        TaskError: no such file, no mapping.
    """
    if text == "default":
        return {name: {} for name in names}
    if text == "small":
        return {name: _small_config(name) for name in names}
    config = _parse_config(text)
    if config and set(config) <= set(names) and all(isinstance(value, dict) for value in config.values()):
        return {name: config.get(name, {}) for name in names}
    return {name: dict(config) for name in names}


def _small_config(name: str) -> dict[str, Any]:
    if name not in registry():
        return {}
    fields = {field.name for field in dataclasses.fields(registry()[name][1])}
    config = {key: value for key, value in SMALL_FIELDS.items() if key in fields}
    try:
        Task(name, config)
    except TaskError:  # number_sequence needs four terms to show its pattern
        return {}
    return config


def _parse_config(text: str) -> dict[str, Any]:
    import yaml

    is_json = text.lstrip().startswith("{")
    if not is_json and not os.path.isfile(text):  # unlike Path.is_file, False for text too long to be a name
        raise TaskError(f"--task_config {text!r} is no file: give small, default, a YAML/JSON file or JSON text")
    try:
        config = yaml.safe_load(text if is_json else read_text(Path(text)))
    except RecursionError as error:
        raise TaskError("--task_config cannot be read: it is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:
        raise TaskError(f"--task_config cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(config, dict):
        raise TaskError(f"--task_config must hold a mapping of fields, got {type(config).__name__}")
    return config


def task_problems(names: Sequence[str], config_text: str, allow_code: bool, supervised: bool) -> list[str]:
    """Every reason why these tasks cannot be used as asked, one line each; an empty list when all is well."""
    # Names: those that Reasoning Gym does not have, and those that stand twice.
    lines = [unknown_task(name) for name in names if name not in registry()]
    twice = sorted({name for name in names if list(names).count(name) > 1})
    lines += [f"task {name} is named twice" for name in twice]

    # What a task would do that nobody asked for, or cannot do.
    for name in names:
        if name in EXECUTES_CODE and not allow_code:
            lines.append(f"task {name} executes code ({EXECUTES_CODE[name]}): type --allow_code_tasks to accept that")
        if name in NO_GOLD and supervised:
            lines.append(f"task {name} has no gold answers, so supervised training has no target: choose another task")

    # Settings: first the text itself, then each task's own fields.
    existing = [name for name in names if name in registry()]
    try:
        configs = read_task_config(config_text, existing)
    except TaskError as error:
        return [*lines, str(error)]
    for name in existing:
        try:
            Task(name, configs[name])
        except TaskError as error:
            lines.append(str(error))
    return lines


def task_warnings(names: Sequence[str], is_strict: bool = True) -> list[str]:
    """What a user should know about the chosen tasks before reading their figures."""
    lines = []
    for name in names:
        if name not in SCORES_ANYTHING:
            continue
        if is_strict:
            lines.append(f"{name} gives any text full score: its mean_score means nothing; solved goes by the strict "
                         "rule")
        else:
            lines.append(f"{name} gives any text full score: none of its figures means anything without "
                         "--verifier_strict 1")

    hashed = [name for name in names if name in HASH_DEPENDENT]
    if hashed and not sys.flags.hash_randomization == 0:
        advice = "items vary with PYTHONHASHSEED; set PYTHONHASHSEED=0 to compare or resume runs"
        lines.append(f"{', '.join(hashed)}: {advice}")
    return lines


def make_tasks(names: Sequence[str], config_text: str, limits: JudgeConfig = USUAL) -> list[Task]:
    """The chosen tasks at the chosen difficulty. Raises TaskError as `task_problems` lists."""
    configs = read_task_config(config_text, names)
    return [Task(name, configs[name], limits) for name in names]


# --- draws ------------------------------------------------------------------------------------------------------------


def train_seed(seed: int) -> int:
    """The data seed of training run `seed`: below 890,000,000, so far below every evaluation seed.

    The first 89 runs lie SEED_GAP apart; later ones lie between them, as the data seeds that all tasks take run out.
    """
    lap, slot = divmod(seed, 89)
    return slot * SEED_GAP + lap * 100_003 % SEED_GAP


def for_evaluation(task: str, group: str) -> bool:
    """Whether items of this group are evaluated; the others are trained on. A function of task and group alone."""
    digest = hashlib.sha256(f"{task}/{group}".encode()).digest()
    return int.from_bytes(digest[:8], "big") % GROUP_SHARE == 0


class Reserve:
    """The evaluation items, drawn and deduplicated before anything else, and the set of their questions.

    The first n items of a larger reserve are those of a smaller one, so `--eval_n 256` reads a part of `--eval_n 1024`.
    With `by_group`, items of a task with groups are drawn from the groups for evaluation, and training is kept off
    those groups whatever n is: the split does not depend on which items were drawn.

    Questions in `trained` are passed over, the next ones take their places, and `passed_over` counts them by task.

    With `seconds` above 0 a task is left when its time is up; `ran_out` says so. `repeated` counts the draws that were
    no new question. `tell` is called with task and number of items after each.

    Raises:
        TaskError: a task has fewer than `n` distinct questions at this difficulty, or makes none in time.
    """

    def __init__(self, tasks: Sequence[Task], n: int, seed: int = EVAL_SEED, must_fill: bool = True,
                 by_group: bool = True, seconds: float = 0.0, tell: Callable[[str, int], None] | None = None,
                 trained: Container[str] = ()):
        self.by_group = by_group
        self.trained = trained
        self.passed_over: dict[str, int] = {}
        self.seconds = seconds
        self.tell = tell
        self.ran_out = False
        self.repeated = 0
        self.examples: list[Example] = []
        self.questions: set[str] = set()
        for task in tasks:
            drawn = self._draw(task, n, seed)
            self.questions.update(normalise(example.question) for example in drawn)
            if must_fill and len(drawn) < n:
                raise TaskError(
                    f"task {task.name} gave only {len(drawn)} distinct questions for evaluation{self._beside(task)}, "
                    f"{n} were asked for: lower --eval_n to {max(len(drawn) // 2, 1)} or raise the difficulty"
                )
            self.examples += drawn

    def _draw(self, task: Task, n: int, seed: int) -> list[Example]:
        drawn: list[Example] = []
        seen: set[str] = set()  # of this task alone: n must not change what another task keeps
        rejected = 0
        until = time.monotonic() + self.seconds
        stream = task.items(seed)
        while len(drawn) < n and rejected < MAX_REJECTED:
            limit_s = max(until - time.monotonic(), 1e-3) if self.seconds else 0.0  # 0 is no limit
            try:
                example = call_within(limit_s, next, stream)[1]
            except TimeLimitError:
                self.ran_out = True
                break

            question = normalise(example.question)
            if question in seen or (self.by_group and not self._may_evaluate(example)):
                rejected += 1
                self.repeated += 1
                continue
            seen.add(question)
            rejected += 1
            if question in self.trained:
                self.passed_over[task.name] = self.passed_over.get(task.name, 0) + 1
                continue
            drawn.append(example)
            rejected = 0
            if self.tell:
                self.tell(task.name, len(drawn))
        return drawn

    def _beside(self, task: Task) -> str:
        count = self.passed_over.get(task.name, 0)
        return f" beside {count} that the checkpoint was trained on" if count else ""

    @staticmethod
    def _may_evaluate(example: Example) -> bool:
        return example.group is None or for_evaluation(example.task, example.group)

    def __contains__(self, question: str) -> bool:
        return normalise(question) in self.questions

    def rejects(self, example: Example) -> bool:
        """Whether this item must not be trained on: its question is evaluated or set aside, or its group is."""
        held_out = self.by_group and example.group is not None and for_evaluation(example.task, example.group)
        return held_out or example.question in self


def reserved_sums(n: int = 0) -> list[tuple[str, str]]:
    """(question, answer) of `n` sums "What is a + b?" of numbers below 100; 0: `SUMS` of them; toy_add's reserve.

    Raises:
        TaskError: there are fewer than `n`.
    """
    examples = Reserve(make_tasks(["toy_add"], "default"), n or SUMS).examples
    return [(example.question, example.target or "") for example in examples]
