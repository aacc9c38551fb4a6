"""The supervised run of the planner/worker LM: well-formed worked examples of every stage's questions.

It is what `--objective ce` trains, and what a GRPO run begins with: a random model never writes a format that a reward
could pick out.
"""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate.utils import set_seed

import options
from addon.draws import drawn_alike
from batching import PromptConfig, PromptFormat
from engine.checkpoints import read_checkpoint
from engine.loop import RunLoop
from engine.machine import Machine, MachineConfig, errors_of, machine_problems, start_machine
from engine.optimization import OptimConfig
from engine.report import Card, Report
from engine.state import CONFIG
from engine.system import Evaluator, Facts, Hooks, LoopConfig
from enhanced.model import create_hrm_model_and_tokenizer
from enhanced.tokenizer import reasoning_tokenizer
from enhanced.training import EnhancedStepConfig, EnhancedTrainer, trained_format
from grpo.levels import level_tasks
from grpo.measure import Measured, measure
from grpo.problems import tasks_of
from grpo.stages import HeldOut, Stage, StagesConfig, check_texts, hold_out, rewards_of, stages_of
from grpo.worked_examples import ExampleData, ExamplesConfig
from host import DEFAULT_HOST
from options import Options, as_dict, part, read_resolved, rerun_text
from own_tasks.record import changes, document_of, plugin_problems, read_record
from own_tasks.trusted import functions_of
from reasoning_gym_wrapper import reserved_sums
from suite.after_run import Subject
from suite.spec import spec_problems
from tasks.plugins import Plugin, load_plugin
from text_data.trained import TrainedQuestions, trained_by
from text_model import CausalTextModel


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a run of the planner/worker LM that can be found without building one, one line each."""
    # A plugin adds tasks that the levels of a stage may name.
    lines = plugin_problems(checkpoint, level_tasks(opts.stages), opts.plugin)
    if lines:
        return lines

    lines = stages_of(part(StagesConfig, opts))[1]
    lines += errors_of(reasoning_tokenizer, opts.tokenizer)
    lines += spec_problems(opts.eval_suite, opts.allow_unconfined_code, opts.eval_suite_split)
    return lines + machine_problems(part(MachineConfig, opts), checkpoint)


# --- evaluation -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class EvaluatorConfig:
    """What the evaluation needs of the flags.

    Args:
        eval_batch_size: completions generated at a time.
        measures_untrained: whether the random model is measured, too, on the questions of the first stage.
    """

    eval_batch_size: int = 128
    measures_untrained: bool = False


class StageEvaluator(Evaluator):
    """Generated answers to the held-out questions of every stage, shared among processes."""

    def __init__(
        self, config: EvaluatorConfig, data: ExampleData, model: Any, trainer: EnhancedTrainer, machine: Machine
    ):
        self.machine = machine
        self.config = config
        self.data = data
        self.model = model
        self.trainer = trainer

    def evaluate(self, step: int) -> Report:
        """All stages with the same weights, the averaged ones. `value` is the share of all questions solved."""
        with self.trainer.evaluation_weights():
            measured = [self._measured(stage) for stage in self.data.stages]

        # One table of all stages; what --save_best_model compares counts every question alike.
        rows = []
        predictions = []
        solved = []
        for stage in measured:
            rows += stage.rows()
            predictions += stage.predictions()
            solved += stage.solved

        table = "\n".join(stage.line() for stage in measured)
        question = measured[0].problems[0].question
        return Report(rows, predictions, table, sum(solved) / len(solved), question=question)

    def before_training(self) -> Report | None:
        """The random model, which writes no format yet."""
        if not self.config.measures_untrained:
            return None

        untrained = self._measured(self.data.stages[0])
        return dataclasses.replace(untrained.report(), table=f"untrained {untrained.line()}")

    def samples(self, turn: int) -> list[str]:
        """The completion of a held-out question of each stage."""
        texts = []
        with self.trainer.evaluation_weights():
            for stage in self.data.stages:
                problem = self.data.held_out.problems[stage.name][0]
                longest = stage.config.max_completion_length
                measured = measure(
                    self.model, self.data.format, stage.name, [problem], [], longest, autocast=self.trainer.autocast()
                )
                texts.append(f"{problem.question!r}\n  {measured.completions[0]!r}")
        return texts

    def _measured(self, stage: Stage) -> Measured:
        functions, _ = rewards_of(stage)
        return measure(
            self.model,
            self.data.format,
            stage.name,
            self.data.held_out.problems[stage.name],
            functions,
            stage.config.max_completion_length,
            batch_size=self.config.eval_batch_size,
            autocast=self.trainer.autocast(),
            machine=self.machine,
        )


# --- the run ----------------------------------------------------------------------------------------------------------


class FinishedHooks(Hooks):
    """Leaves a run alone that is trained and measured, in silence: what follows it goes on from there.

    `extra` keeps `evaluated`, the step of the newest evaluation; checkpoints of earlier versions lack it, and count as
    measured.
    """

    def __init__(self) -> None:
        super().__init__()
        self.extra["evaluated"] = None

    def after_evaluation(self, step: int, report: Report, share: float | None) -> None:
        """Keeps which step was measured last: a run may be killed, or stopped, in its last evaluation."""
        self.extra["evaluated"] = step

    def nothing_to_do(self, step: int, total_steps: int | None, share: float, early: str | None) -> str | None:
        """Nothing is said; None while steps, or the figures of the last one, are missing."""
        is_done = step and (share >= 1 or early) and self.extra.get("evaluated", step) == step
        return "" if is_done else None


class EnhancedRun:
    """The supervised run of `--arch enhanced`, new or going on from `checkpoint`.

    Args:
        opts: the flags.
        checkpoint: where to go on; None = a new run.
        next_stage: what is said at the end where another stage of training follows; it may hold {step}. Then a
            finished run is not trained or evaluated again, and the untrained model is measured too.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: Options, checkpoint: Path | None, next_stage: str = ""):
        self.opts = opts
        config = part(LoopConfig, opts, settings=rerun_text(opts), flags=as_dict(opts))
        self.machine = start_machine(config)
        plugin = self._plugin(checkpoint)
        stages_config = part(StagesConfig, opts)
        self.stages, lines = stages_of(stages_config)
        if lines:
            raise ValueError("; ".join(lines))

        # Questions for evaluation come first: no example may show one.
        self.format = self._format(checkpoint)
        trained = trained_by(checkpoint, goes_on=False)
        held_out = self._hold_out(trained)
        note = held_out.note()
        if note:
            self.machine.say(note)
        place = f"--tokenizer {opts.tokenizer or DEFAULT_HOST}"
        check_texts(held_out, self.format.tokenizer, opts.min_roundtrip, place, self.machine.say)
        if not trained.is_whole:  # a checkpoint from before this was recorded
            warning = unreserved_since(checkpoint, stages_config, opts.eval_seed, held_out)
            if warning:
                self.machine.say(warning)
        self.data = ExampleData(
            part(ExamplesConfig, opts), self.stages, held_out, self.format, self.machine, trained
        )

        # The first weights depend on the seed alone.
        set_seed(opts.seed)
        self.model, _ = create_hrm_model_and_tokenizer(
            opts.d_model, opts.n_heads, opts.max_cycles, opts.n_planner_layers, opts.n_worker_layers, opts.thought_dim,
            self.format.tokenizer,
        )
        self.model.to(self.machine.device)

        self.trainer = EnhancedTrainer(
            part(EnhancedStepConfig, opts),
            part(OptimConfig, opts),
            self.model,
            self.machine.accelerator,
            self.machine.precision,
            self.format,
        )
        self.trainer.more_documents = document_of(None, plugin, functions_of(as_dict(opts)))

        measuring = part(EvaluatorConfig, opts, measures_untrained=bool(next_stage))
        evaluator = StageEvaluator(measuring, self.data, self.model, self.trainer, self.machine)
        hooks = FinishedHooks() if next_stage else Hooks()
        facts = self._facts(next_stage)
        self.loop = RunLoop(config, self.machine, self.data, self.trainer, evaluator, facts, hooks, checkpoint)

    def _plugin(self, checkpoint: Path | None) -> Plugin | None:
        """The plugin that is typed, whose tasks can be named from here on; says where it has changed."""
        plugin = load_plugin(self.opts.plugin) if self.opts.plugin else None
        if not self.opts.reset_progress:
            for line in changes(read_record(checkpoint), None, plugin):
                self.machine.say(line)
        return plugin

    def _hold_out(self, trained: TrainedQuestions) -> HeldOut:
        """The held-out questions, alike in all processes."""
        tasks = tasks_of(level for stage in self.stages for level in stage.levels)
        held_out = drawn_alike(lambda: hold_out(self.stages, self.opts.eval_seed, trained), tasks, self.machine)

        # A training item that one process alone passes over would part the processes.
        if self.machine.world > 1:
            for task in tasks:
                task.most_slow = 1
        return held_out

    def _format(self, checkpoint: Path | None) -> PromptFormat:
        """How questions are shown: as in the checkpoint's training, since a template may write today's date."""
        tokenizer = reasoning_tokenizer(self.opts.tokenizer)
        config = PromptConfig(max_seq_len=self.opts.max_seq_len)
        if checkpoint is None:
            return PromptFormat(tokenizer, config)

        documents = read_checkpoint(checkpoint, stems=[]).documents
        prompt_format, note = trained_format(tokenizer, config, documents)
        if note:
            self.machine.say(note)
        return prompt_format

    @classmethod
    def weights_of(cls, opts: Options, checkpoint: Path) -> EnhancedRun:
        """The run as --eval_only sets it up: the weights of `checkpoint`, nothing to train them on."""
        return cls(options.replace(opts, eval_only=True), checkpoint)

    def go(self) -> int:
        """Runs the command and returns its exit status."""
        return self.loop.go()

    def _facts(self, next_stage: str) -> Facts:
        millions = sum(p.numel() for p in self.model.parameters()) / 1e6
        names = ", ".join(stage.name for stage in self.stages if stage.warm)
        backbone = self.model.model

        card = Card(
            "transformers",
            ["hrm"],
            "Planner/worker LM",
            f" of supervised training on worked examples of {names}.",
            "Load with `AutoModelForCausalLM.from_pretrained` after `import enhanced`, or `generate.py`.",
        )

        return Facts(
            label="enhanced",
            introduction=f"planner/worker LM, {millions:.2f} M parameters, {self.opts.max_cycles} cycles, on "
            f"{self.machine.device}, {self.machine.precision} autocast; worked examples of {names}",
            card=card,
            parts={
                "embedding": backbone.embed_tokens,
                "planner": backbone.planner,
                "worker": backbone.worker,
                "gate": backbone.gate,
                "thought head": self.model.thought_head,
            },
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
            self.text_models, "bare LLM", self.trainer.evaluation_weights, self.loop.record, reserved_sums,
            self.data.trained,
        )


# --- questions that were not reserved ---------------------------------------------------------------------------------


def unreserved(new: int, of: int) -> str:
    """The warning that `new` of `of` held-out questions are not those that the checkpoint's run reserved."""
    return (
        f"WARNING: {new} of {of} held-out questions were not kept off the checkpoint's training: what is solved of "
        "them may have been trained on"
    )


def unreserved_since(checkpoint: Path, config: StagesConfig, seed: int, held_out: HeldOut) -> str | None:
    """A warning where the checkpoint's run did not keep all of today's held-out questions off its training.

    Args:
        checkpoint: the checkpoint that the run goes on from.
        config: the stages of now.
        seed: seed of the held-out questions.
        held_out: these questions.
    """
    before = read_resolved(read_checkpoint(checkpoint, stems=[]).documents[CONFIG])
    seed_before = before.get("eval_seed")
    config_before = dataclasses.replace(config, stages=before.get("stages"), eval_n=before.get("eval_n"))
    if seed_before == seed and config_before == config:
        return None

    # Draws again what that run reserved.
    reserved: set[str] = set()
    try:
        reserved = hold_out(stages_of(config_before)[0], seed_before).reserved
    except ValueError:  # its files are gone, so nothing is known to be reserved
        pass

    new = len(held_out.reserved - reserved)
    return unreserved(new, len(held_out.reserved)) if new else None
