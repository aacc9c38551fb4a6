"""Training data of the supervised run: batches of well-formed worked examples of the stages' questions."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from batching import PromptFormat
from engine.machine import Machine
from engine.records import normalise
from enhanced.training import token_batch
from grpo.problem_files import FileSource
from grpo.problems import Problem, Source, stream
from grpo.stages import HeldOut, Stage
from reasoning_gym_wrapper import train_seed
from text_data.trained import TrainedQuestions

PROBE = 64  # questions of a stage whose prompts are measured against --max_seq_len before anything runs


class WorkedExamples:
    """Endless batches of well-formed examples, none of them reserved.

    Each batch comes from one stage, because mixing prompt lengths wastes padding, and from all levels of that stage.
    Stages are drawn with probability proportional to `warm`. What comes next depends on the seed, on how many batches
    were drawn and on their sizes, so these are a position.

    Args:
        stages: those with `warm` 0, or without an answer to show, are left out.
        reserved: normalised questions that are never shown.
        seed: seed of questions and of their order.

    Raises:
        ValueError: no stage has an answer to show.
    """

    def __init__(self, stages: Sequence[Stage], reserved: set[str], seed: int):
        self.reserved = reserved
        self.seed = seed

        self.stages = [stage for stage in stages if stage.warm and any(map(self._has_answers, stage.levels))]
        if not self.stages:
            raise ValueError(
                "no stage gives the warm start an example to learn from: add answers to its file, or a stage whose "
                "questions have them"
            )
        self._begin()

    def _begin(self) -> None:
        """Goes to the first batch."""
        self.drawn = 0
        self.sizes: list[list[int]] = []  # [examples of a batch, batches in a row] of all that were drawn
        self._streams: list[list[Iterator[Problem]]] = []  # of each stage, one for each level
        for stage in self.stages:
            streams = []
            for level in stage.levels:
                if self._has_answers(level):
                    streams.append(stream(level, train_seed(self.seed), self.reserved))
            self._streams.append(streams)

    def _has_answers(self, level: Source) -> bool:
        """False for a prepared file of tests alone, or whose answers are all reserved."""
        if not isinstance(level, FileSource):
            return True

        # A search for an answer in such a file would never end.
        return any(row.answer and normalise(row.question) not in self.reserved for row in level.rows)

    def take(self, count: int) -> list[tuple[Problem, str]]:
        """The next batch: `count` problems, each with its example."""
        draw = random.Random(f"{self.seed}/{self.drawn}")

        # A generator of its own for each batch: a position is then the number of batches, not a generator's state.
        (index,) = draw.choices(range(len(self.stages)), [stage.warm for stage in self.stages])
        self.drawn += 1
        if not self.sizes or self.sizes[-1][0] != count:
            self.sizes.append([count, 0])
        self.sizes[-1][1] += 1

        # All levels first, then all problems, then all guesses: this order fixes the batches of a seed.
        levels = [draw.choice(self._streams[index]) for _ in range(count)]
        problems = [next(problem for problem in level if problem.answer) for level in levels]

        guess = self.stages[index].guess
        return [(problem, problem.worked(draw.random() < guess)) for problem in problems]

    def skip_to(self, sizes: Sequence[Sequence[int]]) -> None:
        """Draws again the batches that a resumed run has had, given its `sizes`."""
        self._begin()

        # The streams reject what is reserved, so how far they are is known only by drawing.
        for count, batches in sizes:
            for _ in range(batches):
                self.take(count)


@dataclass(frozen=True)
class ExamplesConfig:
    """The flags of the supervised run's data.

    Args:
        batch_size: examples of a micro-batch of one process, 1 or more.
        grad_accum_steps: micro-batches of a batch, in each process, 1 or more.
        max_seq_len: most tokens of a prompt.
        seed: seed of the examples.
        eval_only: True draws no training examples.
    """

    batch_size: int = 64
    grad_accum_steps: int = 1
    max_seq_len: int = 1024
    seed: int = 0
    eval_only: bool = False


class ExampleData:
    """The supervised run's batches, as `engine.system.Data`.

    Args:
        config: the flags.
        stages: what the examples are of.
        held_out: the questions that are evaluated and never shown.
        prompt_format: renders questions and examples.
        machine: the process that this is, and where its batches go.
        trained: what the weights were trained on so far; it grows by every example.

    Raises:
        ValueError: no examples, or prompts longer than --max_seq_len.
    """

    def __init__(
        self,
        config: ExamplesConfig,
        stages: Sequence[Stage],
        held_out: HeldOut,
        prompt_format: PromptFormat,
        machine: Machine,
        trained: TrainedQuestions | None = None,
    ):
        self.config = config
        self.trained = trained or TrainedQuestions()
        self.stages = stages
        self.held_out = held_out
        self.format = prompt_format
        self.machine = machine

        self.examples = None
        if not config.eval_only:
            self.examples = WorkedExamples(stages, held_out.reserved, config.seed)
        self._check_lengths()

    def _check_lengths(self) -> None:
        """Raises ValueError where a stage's prompts pass --max_seq_len."""
        limit = self.config.max_seq_len

        # All questions of a stage are alike in length, so a sample tells before hours of training do.
        for stage in self.stages:
            questions = [problem.question for problem in self.held_out.problems[stage.name][:PROBE]]
            longest = max(map(len, self.format.prompts(questions)))

            if longest > limit:
                raise ValueError(
                    f"stage {stage.name} has prompts of {longest} tokens, --max_seq_len allows {limit}: raise it or "
                    "choose other tasks"
                )

    @property
    def size(self) -> int:
        """Examples of one epoch."""
        return sum(stage.size for stage in self.stages if stage.warm)

    def next_batches(self) -> list[dict[str, torch.Tensor]]:
        """The micro-batches of the next batch, on the device, each as `token_batch` makes it."""
        # Every process draws the micro-batches of all and keeps its own, so all of them stay at one position. Which
        # micro-batches there are depends on --batch_size alone, however many processes share them.
        batches = []
        for number in range(self.config.grad_accum_steps * self.machine.world):
            drawn = self.examples.take(self.config.batch_size)
            for problem, _ in drawn:
                self.trained.add(problem.question)
            if number % self.machine.world != self.machine.rank:
                continue
            problems, texts = zip(*drawn, strict=True)
            batch = token_batch(self.format, [problem.question for problem in problems], texts)
            batches.append({name: tensor.to(self.machine.device) for name, tensor in batch.items()})

        return batches

    def state(self) -> dict[str, Any]:
        """The position in the examples."""
        return {"drawn": self.examples.drawn, "sizes": [list(entry) for entry in self.examples.sizes]}

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes to a position that `state` returned."""
        # Checkpoints from before sizes were kept had batches of one size.
        self.examples.skip_to(state.get("sizes", [[self.config.batch_size, state["drawn"]]]))

    def documents(self) -> dict[str, str]:
        """The record of what was trained on."""
        return self.trained.documents()

    def describe(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        """Every example of `batches` as text, for the record of a bad batch."""
        examples = []
        for batch in batches:
            for row, mask in zip(batch["input_ids"].cpu(), batch["attention_mask"].cpu(), strict=True):
                examples.append({"text": self.format.tokenizer.decode(row[mask.bool()])})

        return examples
