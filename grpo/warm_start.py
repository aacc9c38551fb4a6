"""The supervised run of the planner/worker LM: well-formed worked examples of every stage's questions.

It is what `--objective ce` trains, and what a GRPO run begins with: a random model never writes a format that a reward
could pick out.
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed

from batching import PromptFormat
from engine.checkpoints import read_checkpoint
from engine.loop import RunLoop
from engine.machine import Machine, MachineConfig, machine_problems, raised, start_machine
from engine.records import normalise
from engine.report import Card, Report
from engine.state import CONFIG
from engine.system import Evaluator, Facts, Hooks, LoopConfig
from enhanced.model import create_hrm_model_and_tokenizer
from enhanced.tokenizer import reasoning_tokenizer
from enhanced.training import EnhancedTrainer, token_batch
from grpo.measure import Measured, measure
from grpo.problems import FileSource, Problem, stream
from grpo.stages import Stage, StagesConfig, hold_out, rewards_of, stages_of
from options import Options, as_dict, part, read_resolved, rerun_text
from reasoning_gym_wrapper import reserved_sums, train_seed
from suite.after_run import Subject
from suite.spec import spec_problems
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


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the planner/worker LM that can be found without building one, one line each."""
    lines = stages_of(part(StagesConfig, opts))[1]
    lines += raised([lambda: reasoning_tokenizer(opts.tokenizer)])
    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code)
    return lines + machine_problems(part(MachineConfig, opts), checkpoint)


class WarmData:
    """Worked examples of the stages' questions, the held-out ones left out; see `engine.system.Data`."""

    def __init__(self, opts: argparse.Namespace, stages: list[Stage], machine: Machine, checkpoint: Path | None):
        self.opts = opts
        self.machine = machine
        self.stages = stages
        self.format = PromptFormat(reasoning_tokenizer(opts.tokenizer), max_seq_len=opts.max_seq_len)
        self.held = hold_out(stages, opts.eval_seed)
        if checkpoint:
            self._tell_unreserved(checkpoint)
        self.examples = None if opts.eval_only else WorkedExamples(stages, self.held.reserved, opts.seed)
        self._check_lengths()

    def _tell_unreserved(self, checkpoint: Path) -> None:
        """Warns of held-out questions that the checkpoint's run did not keep off its training."""
        before = read_resolved(read_checkpoint(checkpoint, stems=[]).documents[CONFIG])
        opts = Options(**vars(self.opts) | {name: before.get(name) for name in ("stages", "eval_n", "eval_seed")})
        if opts == self.opts:
            return
        try:
            kept = hold_out(stages_of(part(StagesConfig, opts))[0], opts.eval_seed).reserved
        except ValueError:  # its files are gone
            kept = set()
        new = len(self.held.reserved - kept)
        if new:
            self.machine.say(unreserved(new, len(self.held.reserved)))

    def _check_lengths(self) -> None:
        """Raises ValueError where a stage's prompts pass --max_seq_len."""
        for stage in self.stages:
            probe = [p.question for p in self.held.problems[stage.name][:PROBE]]
            longest = max(map(len, self.format.prompts(probe)))
            if longest > self.opts.max_seq_len:
                raise ValueError(f"stage {stage.name} has prompts of {longest} tokens, --max_seq_len allows "
                                 f"{self.opts.max_seq_len}: raise it or choose other tasks")

    @property
    def size(self) -> int:
        return sum(stage.size for stage in self.stages if stage.warm)

    def next_batches(self) -> list[dict[str, torch.Tensor]]:
        batches = []
        for _ in range(self.opts.grad_accum_steps):
            drawn = self.examples.take(self.opts.batch_size * self.machine.world)
            mine = drawn[self.machine.rank :: self.machine.world]
            batch = token_batch(self.format, [p.question for p, _ in mine], [text for _, text in mine])
            batches.append({name: tensor.to(self.machine.device) for name, tensor in batch.items()})
        return batches

    def state(self) -> dict[str, Any]:
        return {"drawn": self.examples.drawn}

    def load_state(self, state: dict[str, Any]) -> None:
        self.examples.skip_to(state["drawn"], self.opts.batch_size * self.machine.world)

    def describe(self, batches: list[dict[str, torch.Tensor]]) -> list[dict[str, Any]]:
        decode = self.format.tokenizer.decode
        return [{"text": decode(row[mask.bool()])} for b in batches
                for row, mask in zip(b["input_ids"].cpu(), b["attention_mask"].cpu(), strict=True)]


class StageEvaluator(Evaluator):
    """Generated answers to the held-out questions of every stage. One rank does it all."""

    def __init__(self, opts: argparse.Namespace, data: WarmData, model: Any, trainer: EnhancedTrainer):
        self.opts = opts
        self.data = data
        self.model = model
        self.trainer = trainer

    def evaluate(self, step: int) -> Report:
        with self.trainer.evaluation_weights():
            parts = [self._measured(stage) for stage in self.data.stages]
        rows = [row for part in parts for row in part.rows(step)]
        predictions = [line for part in parts for line in part.predictions(step)]
        table = "\n".join(part.line() for part in parts)
        solved = [each for part in parts for each in part.solved]
        question = parts[0].problems[0].question
        return Report(rows, predictions, table, sum(solved) / len(solved), question=question)

    def _measured(self, stage: Stage) -> Measured:
        functions, _ = rewards_of(stage)
        return measure(
            self.model, self.data.format, stage.name, self.data.held.problems[stage.name], functions,
            stage.config.max_completion_length, True, self.opts.eval_batch_size, self.trainer.autocast(),
        )

    def before_training(self) -> Report | None:
        """A GRPO run's first rows are those of the random model, which writes no format yet."""
        if self.opts.objective != "grpo":
            return None
        first = self._measured(self.data.stages[0])
        return Report(first.rows(0), first.predictions(0), f"untrained {first.line()}")

    def samples(self, turn: int) -> list[str]:
        """The completion of a held-out question of each stage."""
        texts = []
        with self.trainer.evaluation_weights():
            for stage in self.data.stages:
                one = self.data.held.problems[stage.name][:1]
                longest = stage.config.max_completion_length
                found = measure(
                    self.model, self.data.format, stage.name, one, [], longest, autocast=self.trainer.autocast()
                )
                texts.append(f"{one[0].question!r}\n  {found.completions[0]!r}")
        return texts


class WarmHooks(Hooks):
    """A warm start that is over is left alone, and says nothing: GRPO goes on from it."""

    def __init__(self, objective: str):
        super().__init__()
        self.objective = objective

    def nothing_to_do(self, step: int, total_steps: int | None, share: float) -> str | None:
        return "" if self.objective == "grpo" and step and share >= 1 else None


class EnhancedRun:
    """The supervised run of `--arch enhanced`, new or going on from `checkpoint`.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: Options, checkpoint: Path | None):
        self.opts = opts
        config = part(LoopConfig, opts, settings=rerun_text(opts), flags=as_dict(opts))
        self.machine = start_machine(config)
        self.stages, wrong = stages_of(part(StagesConfig, opts))
        if wrong:
            raise ValueError("; ".join(wrong))
        self.data = WarmData(opts, self.stages, self.machine, checkpoint)
        self.format = self.data.format

        set_seed(opts.seed)
        self.model, _ = create_hrm_model_and_tokenizer(
            opts.d_model, opts.n_heads, opts.max_cycles, opts.n_planner_layers, opts.n_worker_layers, opts.thought_dim,
            self.format.tokenizer,
        )
        self.model.to(self.machine.device)
        self.trainer = EnhancedTrainer(
            opts, self.model, self.machine.accelerator, self.machine.precision, self.format
        )
        evaluator = StageEvaluator(opts, self.data, self.model, self.trainer)
        self.loop = RunLoop(
            config, self.machine, self.data, self.trainer, evaluator, self._facts(), WarmHooks(opts.objective),
            checkpoint,
        )

    def go(self) -> int:
        """Runs the command and returns its exit status."""
        return self.loop.go()

    def _facts(self) -> Facts:
        opts = self.opts
        count = sum(p.numel() for p in self.model.parameters())
        names = ", ".join(stage.name for stage in self.stages if stage.warm)
        backbone = self.model.model
        next_stage = ""
        if opts.objective == "grpo":
            next_stage = "the warm start is done after {step} steps; GRPO goes on from here"
        return Facts(
            label="enhanced",
            introduction=f"planner/worker LM, {count / 1e6:.2f} M parameters, {opts.max_cycles} cycles, on "
            f"{self.machine.device}, {self.machine.precision} autocast; worked examples of {names}",
            card=Card(
                "transformers",
                ["hrm"],
                "Planner/worker LM",
                f" of supervised training on worked examples of {names}.",
                "Load with `AutoModelForCausalLM.from_pretrained` after `import enhanced`, or `generate.py`.",
            ),
            parts={"embedding": backbone.embed_tokens, "planner": backbone.planner, "worker": backbone.worker,
                   "gate": backbone.gate, "thought head": self.model.thought_head},
            next_stage=next_stage,
        )

    def text_models(self) -> tuple[CausalTextModel, None]:
        """The model as text in, text out; it is compared with nothing."""
        size = self.opts.eval_batch_size
        return CausalTextModel(self.model, self.format, size, autocast=self.trainer.autocast), None

    def suite_subject(self) -> Subject | None:
        """What --eval_suite measures; None before the run is finished and on other processes than the main one."""
        if not self.loop.finished or not self.machine.is_main:
            return None
        return Subject(
            self.text_models, "bare LLM", self.trainer.evaluation_weights, self.loop.record, reserved_sums
        )
