"""The supervised run of the planner/worker LM: well-formed worked examples of every stage's questions.

It is what `--objective ce` trains, and what a GRPO run begins with: a random model never writes a format that a reward
could pick out.
"""

from __future__ import annotations

import argparse
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from batching import PromptFormat
from engine.checkpoints import read_checkpoint, step_folder
from engine.logs import Progress, draw_curve
from engine.loop import RunLoop, closing_words
from engine.machine import MachineConfig, machine_problems, raised
from engine.records import normalise
from engine.state import CONFIG
from enhanced.model import create_hrm_model_and_tokenizer
from enhanced.tokenizer import reasoning_tokenizer
from enhanced.training import EnhancedTrainer, token_batch
from grpo.measure import Measured, measure
from grpo.problems import FileSource, Problem, stream
from grpo.stages import Stage, StagesConfig, hold_out, rewards_of, stages_of
from options import Options, part, read_resolved
from reasoning_gym_wrapper import train_seed
from suite.measure import spec_problems
from text_model import CausalTextModel

PROBE = 64  # training examples whose prompts are measured against --max_seq_len before anything runs


class WorkedExamples:
    """Endless batches of well-formed examples, none of them reserved.

    A batch is of one stage (their prompts differ in length, and padding costs), drawn by the stages' shares `warm`, and
    of all its levels. What comes next depends on the seed and on how many batches were drawn: a position is a number.

    Raises:
        ValueError: no stage has an answer to show.
    """

    def __init__(self, stages: list[Stage], reserved: set[str], seed: int):
        self.reserved, self.seed, self.drawn = reserved, seed, 0
        self.stages = [stage for stage in stages if stage.warm and any(map(self._has_answers, stage.levels))]
        if not self.stages:
            raise ValueError("no stage gives the warm start an example to learn from: add answers to its file, or a "
                             "stage whose questions have them")
        self._begin()

    def _begin(self) -> None:
        self._streams = [
            [stream(level, train_seed(self.seed), self.reserved) for level in stage.levels if self._has_answers(level)]
            for stage in self.stages
        ]

    def _has_answers(self, level: Any) -> bool:
        """False for a prepared file of tests alone, or whose answers are all reserved."""
        return not isinstance(level, FileSource) or any(
            problem.answer and normalise(problem.question) not in self.reserved for problem in level.rows
        )

    def take(self, count: int) -> list[tuple[Problem, str]]:
        """The next batch: `count` problems, each with its example."""
        draw = random.Random(f"{self.seed}/{self.drawn}")
        (index,) = draw.choices(range(len(self.stages)), [stage.warm for stage in self.stages])
        self.drawn += 1
        sources = [draw.choice(self._streams[index]) for _ in range(count)]
        problems = [next(problem for problem in source if problem.answer) for source in sources]
        return [(problem, problem.worked(draw.random() < self.stages[index].guess)) for problem in problems]

    def skip_to(self, drawn: int, count: int) -> None:
        """Draws again the `drawn` batches of `count` problems that a resumed run has had."""
        self.drawn = 0
        self._begin()
        while self.drawn < drawn:
            self.take(count)


def unreserved(new: int, of: int) -> str:
    """The warning that `new` of `of` held-out questions are not those that the checkpoint's run reserved."""
    return (f"WARNING: {new} of {of} held-out questions were not kept off the checkpoint's training: what is solved of "
            "them may have been trained on")


@dataclass
class StageEvaluation:
    """Every stage's held-out questions, measured with the same weights."""

    parts: list[Measured]

    @property
    def solved(self) -> float:
        """Share of all questions solved."""
        solved = [each for part in self.parts for each in part.solved]
        return sum(solved) / len(solved)


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the planner/worker LM that can be found without building one, one line each."""
    lines = stages_of(part(StagesConfig, opts))[1]
    lines += raised([lambda: reasoning_tokenizer(opts.tokenizer)])
    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code)
    return lines + machine_problems(part(MachineConfig, opts), checkpoint)


class EnhancedRun(RunLoop):
    """The run of `--arch enhanced`, supervised: see `RunLoop`."""

    problems = staticmethod(problems)
    in_stages = True  # of a GRPO run, whose suite waits for the last stage

    def build_data(self) -> None:
        opts = self.opts
        stages, problems = stages_of(part(StagesConfig, opts))
        if problems:
            raise ValueError("; ".join(problems))
        self.stages = stages
        self.format = PromptFormat(reasoning_tokenizer(opts.tokenizer), max_seq_len=opts.max_seq_len)
        self.held = hold_out(stages, opts.eval_seed)
        if self.checkpoint:
            self._tell_unreserved()
        self.examples = None if opts.eval_only else WorkedExamples(stages, self.held.reserved, opts.seed)
        self._check_lengths()

    def _tell_unreserved(self) -> None:
        """Warns of held-out questions that the checkpoint's run did not keep off its training."""
        before = read_resolved(read_checkpoint(self.checkpoint, stems=[]).documents[CONFIG])
        opts = Options(**vars(self.opts) | {name: before.get(name) for name in ("stages", "eval_n", "eval_seed")})
        if opts == self.opts:
            return
        try:
            kept = hold_out(stages_of(part(StagesConfig, opts))[0], opts.eval_seed).reserved
        except ValueError:  # its files are gone
            kept = set()
        new = len(self.held.reserved - kept)
        if new:
            self.say(unreserved(new, len(self.held.reserved)))

    def _check_lengths(self) -> None:
        """Raises ValueError where a stage's prompts pass --max_seq_len."""
        for stage in self.stages:
            probe = [p.question for p in self.held.problems[stage.name][:PROBE]]
            longest = max(map(len, self.format.prompts(probe)))
            if longest > self.opts.max_seq_len:
                raise ValueError(f"stage {stage.name} has prompts of {longest} tokens, --max_seq_len allows "
                                 f"{self.opts.max_seq_len}: raise it or choose other tasks")

    def build_trainer(self) -> EnhancedTrainer:
        opts = self.opts
        self.model, _ = create_hrm_model_and_tokenizer(
            opts.d_model, opts.n_heads, opts.max_cycles, opts.n_planner_layers, opts.n_worker_layers, opts.thought_dim,
            self.format.tokenizer,
        )
        self.model.to(self.device)
        return EnhancedTrainer(opts, self.model, self.accelerator, self.precision, self.format)

    # --- what the loop asks ---

    def label(self) -> str:
        return "enhanced"

    def introduce(self) -> str:
        count = sum(p.numel() for p in self.model.parameters())
        what = f"planner/worker LM, {count / 1e6:.2f} M parameters, {self.opts.max_cycles} cycles"
        return f"{what}, on {self.device}, {self.precision} autocast; worked examples of {self._names()}"

    def _names(self) -> str:
        return ", ".join(stage.name for stage in self.stages if stage.warm)

    def is_done(self) -> bool:
        """The warm start of a GRPO run is over: nothing to say."""
        return self.opts.objective == "grpo" and bool(self.step) and self._progress_share() >= 1

    def next_batches(self) -> list[dict[str, torch.Tensor]]:
        batches = []
        for _ in range(self.opts.grad_accum_steps):
            drawn = self.examples.take(self.opts.batch_size * self.world)
            mine = drawn[self.rank :: self.world]
            batch = token_batch(self.format, [p.question for p, _ in mine], [text for _, text in mine])
            batches.append({name: tensor.to(self.device) for name, tensor in batch.items()})
        return batches

    def position(self) -> dict[str, Any]:
        return {"drawn": self.examples.drawn}

    def set_position(self, position: dict[str, Any]) -> None:
        self.examples.skip_to(position["drawn"], self.opts.batch_size * self.world)

    def data_size(self) -> int:
        return sum(stage.size for stage in self.stages if stage.warm)

    def parts(self) -> dict[str, Any]:
        backbone = self.model.model
        return {"embedding": backbone.embed_tokens, "planner": backbone.planner, "worker": backbone.worker,
                "gate": backbone.gate, "thought head": self.model.thought_head}

    def describe(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        decode = self.format.tokenizer.decode
        return [{"text": decode(row[mask.bool()])} for b in batches
                for row, mask in zip(b["input_ids"].cpu(), b["attention_mask"].cpu(), strict=True)]

    def text_models(self) -> tuple[CausalTextModel, None]:
        return CausalTextModel(self.model, self.format, self.opts.eval_batch_size, autocast=self.trainer.autocast), None

    def _suite(self) -> None:
        if self.opts.objective != "grpo" or self.opts.eval_only or not self.in_stages:
            super()._suite()

    # --- evaluation ---

    def evaluate(self) -> StageEvaluation:
        """Generates on every stage's held-out questions; writes CSV and predictions. One rank does it all."""
        with self.trainer.evaluation_weights():
            return StageEvaluation([self._measured(stage) for stage in self.stages])

    def _measured(self, stage: Stage) -> Measured:
        """One stage's held-out questions, measured and written down."""
        functions, _ = rewards_of(stage)
        measured = measure(
            self.model, self.format, stage.name, self.held.problems[stage.name], functions,
            stage.config.max_completion_length, True, self.opts.eval_batch_size, self.trainer.autocast(),
        )
        self.log.eval_rows(measured.rows(self.step))
        self.log.predictions(measured.predictions(self.step))
        return measured

    def _train(self) -> int:
        """As every run; a GRPO run's first rows are those of the random model, which writes no format yet."""
        if self.step == 0 and self.opts.objective == "grpo":
            self.say(f"untrained {self._measured(self.stages[0]).line()}")
        return super()._train()

    def table(self, evaluation: StageEvaluation) -> str:
        return "\n".join(part.line() for part in evaluation.parts)

    def value(self, evaluation: StageEvaluation) -> float:
        return evaluation.solved

    def show_samples(self, progress: Progress) -> None:
        """The completion of a held-out question of each stage."""
        with self.trainer.evaluation_weights():
            for stage in self.stages:
                one = self.held.problems[stage.name][:1]
                longest = stage.config.max_completion_length
                found = measure(self.model, self.format, stage.name, one, [], longest, autocast=self.trainer.autocast())
                progress.say(f"[step {self.step}] {one[0].question!r}\n  {found.completions[0]!r}")

    def finish(self, evaluation: StageEvaluation) -> None:
        """The closing words: table, files, next command."""
        if not self.is_main:
            return
        print(self.table(evaluation))
        if self.opts.objective == "grpo" and not self.opts.eval_only:
            print(f"the warm start is done after {self.step} steps; GRPO goes on from here", flush=True)
            return
        curve = draw_curve(self.folder, self.log.csv_path)
        newest = self.checkpoint if self.opts.eval_only else step_folder(self.folder, self.step)
        print(closing_words(self.log.csv_path, newest, curve, evaluation.parts[0].problems[0].question))

    def card(self, evaluation: StageEvaluation | None) -> str:
        """The checkpoint's README.md."""
        lines = ["---\nlibrary_name: transformers\ntags: [hrm]\n---\n", "# Planner/worker LM\n",
                 f"Step {self.step} of supervised training on worked examples of {self._names()}.",
                 "Load with `AutoModelForCausalLM.from_pretrained` after `import enhanced`, or `generate.py`.\n"]
        return "\n".join(lines) + (f"\n```\n{self.table(evaluation)}\n```\n" if evaluation else "")
