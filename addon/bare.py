"""The bare LLM beside the add-on: what it may use that the add-on does not need, so that the comparison is fair."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from addon.items import AddonData
from addon.streams import TrainStream
from batching import PromptFormat
from engine.records import normalise
from engine.stopping import stop_point
from evaluation import Answer, Decoding, answer
from reasoning_gym_wrapper import NO_GOLD, Example, Task, TaskError, train_seed
from text_data.frames import EXAMPLE_GAP, frame_with_examples
from text_data.taken import written_answer

MOST_DRAWS = 200  # training items that are looked at for a task's solved examples

Solved = Sequence[tuple[str, str]]  # (question, answer) of solved examples


@dataclass(frozen=True)
class BareConfig:
    """What the bare LLM is given; each field is the flag of its name.

    bare_max_new_tokens: longest answer of the bare LLM; 0 = as the add-on's.
    few_shot: solved examples of the same task that a second prompt puts before the question; 0 = no second prompt.
    """

    bare_max_new_tokens: int = 0
    few_shot: int = 0


@dataclass(frozen=True)
class BareAnswers:
    """The bare LLM's answers to the same items, in the same order.

    plain: to the add-on's own prompts.
    few_shot: behind solved examples; empty without --few_shot.
    """

    plain: list[Answer] = field(default_factory=list)
    few_shot: list[Answer] = field(default_factory=list)


def bare_problems(tasks: Sequence[str], few_shot: int) -> list[str]:
    """Why these tasks have no solved examples to show, one line each."""
    lines = []
    for name in tasks:
        if few_shot and name in NO_GOLD:
            lines.append(f"--few_shot {few_shot}: task {name} has no gold answers to show: choose another task, or 0")
    return lines


class BareLLM:
    """Asks the bare LLM. Its solved examples are training items: the same for every question of a task.

    Raises:
        ValueError: a task has too few examples to show (TaskError).
    """

    def __init__(self, config: BareConfig, data: AddonData):
        self.config = config
        self.data = data
        self._formats: dict[str, PromptFormat] = {}
        self._tasks: Sequence[Task] = ()  # whose examples `_formats` show

    @property
    def budget(self) -> int:
        """Tokens that an answer may have."""
        return self.config.bare_max_new_tokens or self.data.budget

    def formats(self) -> Mapping[str, PromptFormat]:
        """Task -> the prompt format with its solved examples; empty without --few_shot."""
        if self.config.few_shot and self._tasks is not self.data.tasks:
            self._formats = {}
            for task in self.data.tasks:
                solved = solved_examples(task, self.data, self.config.few_shot)
                self._formats[task.name] = format_with_examples(self.data.format, solved)
            self._tasks = self.data.tasks
        return self._formats

    def longest(self) -> int:
        """Tokens of the longest prompt and a whole answer together."""
        lengths = self.data.format.prompt_lengths(self.data.held_out)
        for task, shown in self.formats().items():
            lengths += shown.prompt_lengths([example for example in self.data.held_out if example.task == task])
        return max(lengths) + self.budget

    @torch.no_grad()
    def answers(self, model: Any, examples: Sequence[Example], decoding: Decoding) -> BareAnswers:
        """Its answers to `examples`. `model` is the controller; its mode stays as it was."""
        decoding = replace(decoding, max_new_tokens=self.budget)
        was_training = model.training
        model.eval()
        try:
            with model.bare() as host:
                plain = answer(host, self.data.format, examples, decoding, thinks=False)
                return BareAnswers(plain, self._few_shot(host, examples, decoding))
        finally:
            model.train(was_training)

    def _few_shot(self, host: Any, examples: Sequence[Example], decoding: Decoding) -> list[Answer]:
        """The answers behind solved examples, task by task, put back into the order of `examples`."""
        given: dict[int, Answer] = {}
        for task, shown in self.formats().items():
            # Asked without any question too: another process may have some, see `engine.sharding.idle_turns`.
            places = [place for place, example in enumerate(examples) if example.task == task]
            mine = [examples[place] for place in places]
            given.update(zip(places, answer(host, shown, mine, decoding, thinks=False), strict=True))
        return [given[place] for place in sorted(given)]


def solved_examples(task: Task, data: AddonData, count: int) -> list[tuple[str, str]]:
    """The first `count` distinct training items of a task: never one that is evaluated, nor a special token's name.

    Raises:
        TaskError: it has fewer among `MOST_DRAWS`, or no gold answers.
    """
    stream = TrainStream([task], data.reserve, train_seed(data.config.seed))
    solved: dict[str, tuple[str, str]] = {}
    for _ in range(MOST_DRAWS):
        stop_point()
        example = next(stream)
        if not data.format.names_special(f"{example.question}\n{example.target}"):
            solved.setdefault(normalise(example.question), (example.question, example.target or ""))
        if len(solved) == count:
            return list(solved.values())
    raise TaskError(
        f"--few_shot {count}: task {task.name} has only {len(solved)} examples to show among {MOST_DRAWS} training "
        f"items: choose --few_shot {len(solved)} or fewer"
    )


def format_with_examples(prompt_format: PromptFormat, solved: Solved) -> PromptFormat:
    """A copy of the format that puts these solved examples before every question.

    Their answers are written as `--answer_from` looks for them, and end as targets do. In plain text an answer stops
    where the next example would begin, as those shown do.
    """
    shown = []
    for question, gold in solved:
        written = written_answer(gold.strip(), prompt_format.answer_from) + (prompt_format.sentinel or "")
        shown.append((question.strip(), written))

    other = copy.copy(prompt_format)
    other.frame = frame_with_examples(
        prompt_format.frame, prompt_format.tokenizer, prompt_format.config.system_header, shown
    )
    other.prefix = other.frame.prefix
    in_answers = any(EXAMPLE_GAP in written for _, written in shown)
    if not other.chat and not other.sentinel and not in_answers:
        other.sentinel = EXAMPLE_GAP
    return other
