"""A GRPO run: the supervised run that it begins with, then the stages."""

from __future__ import annotations

import argparse
from pathlib import Path

import addon_run
import options
from addon.draws import drawn_alike
from addon_run import AddonRun
from grpo import warm_start
from grpo.levels import level_tasks
from grpo.problems import tasks_of
from grpo.progress import GrpoProgress, read_progress
from grpo.stage_loop import StageLoop, StageLoopConfig
from grpo.stages import HeldOut, StagesConfig, check_texts, hold_out, stages_of
from grpo.trained import TrainedModel, trained_addon, trained_planner
from grpo.warm_start import EnhancedRun, unreserved
from own_tasks.record import plugin_problems
from reasoning_gym_wrapper import reserved_sums
from suite.after_run import Subject

WARM_START_DONE = "the warm start is done after {step} steps; GRPO goes on from here"


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a GRPO run that can be found without loading a model, one line each."""
    if opts.arch == "enhanced":
        return warm_start.problems(opts, checkpoint)

    # A plugin adds tasks that the stage's levels may name, too.
    if checkpoint is not None:
        lines = plugin_problems(checkpoint, level_tasks(opts.stages), opts.plugin)
        if lines:
            return lines

    # The add-on's stage needs the tasks, which are right only if the supervised run has nothing against them.
    lines = addon_run.problems(opts, checkpoint)
    if checkpoint is None:
        return ["--arch addon --objective grpo needs --resume CHECKPOINT, one trained with --objective ce", *lines]
    try:
        tasks = addon_run.chosen_tasks(opts, checkpoint)
    except ValueError:  # what is wrong with the tasks is among the lines
        return lines
    return lines + stages_of(options.part(StagesConfig, opts), tasks)[1]


class GrpoRun:
    """A run of `--objective grpo`, new or going on from `checkpoint`.

    The planner/worker LM begins with a warm start; the add-on begins with a checkpoint of its own training.

    Raises:
        ValueError: the user's mistakes.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: options.Options, checkpoint: Path | None):
        self.opts = opts
        self.checkpoint = checkpoint
        self.supervised: AddonRun | EnhancedRun | None = None
        self.stage_loop: StageLoop | None = None
        self.finished = False

    @property
    def _kind(self) -> type[AddonRun] | type[EnhancedRun]:
        return AddonRun if self.opts.arch == "addon" else EnhancedRun

    def go(self) -> int:
        """Runs what is left to do, or what --eval_only and --dry_run ask for. Returns the exit status."""
        opts = self.opts
        if opts.eval_only or opts.dry_run:  # of the supervised run, which does both
            self.supervised = self._kind(opts, self.checkpoint)
            return self.supervised.go()

        # A run that has begun its stages, and the add-on, go on from weights alone: what trained them is over.
        goes_on = self.checkpoint is not None and not opts.reset_progress
        progress = read_progress(self.checkpoint) if goes_on else None
        weights = self.checkpoint
        if progress is not None or opts.arch == "addon":
            self.supervised = self._kind.weights_of(opts, self.checkpoint)
        else:
            self.supervised = EnhancedRun(opts, self.checkpoint, next_stage=WARM_START_DONE)
            status = self.supervised.go()
            if status:
                return status
            weights = None

        # From here on both systems are alike.
        trained = self._trained(weights)
        progress = progress or GrpoProgress(trained.step, elapsed_s=trained.elapsed_s)
        self.stage_loop = self._stage_loop(trained, progress)
        status = self.stage_loop.run()
        self.finished = status == 0
        return status

    def _trained(self, checkpoint: Path | None) -> TrainedModel:
        """What the supervised run hands over: the weights of `checkpoint`; None = those of its newest."""
        if isinstance(self.supervised, AddonRun):
            return trained_addon(self.supervised, checkpoint)
        return trained_planner(self.supervised, checkpoint)

    def _stage_loop(self, trained: TrainedModel, progress: GrpoProgress) -> StageLoop:
        """The stages, with their held-out questions drawn. Raises ValueError for stages that cannot be run."""
        opts = self.opts
        if trained.budget is not None and "max_completion_length" not in opts.explicit:
            # As long as the answers to the tasks may be in the supervised run; checkpoints keep the number.
            opts = options.replace(opts, max_completion_length=trained.budget)
        stages, lines = stages_of(options.part(StagesConfig, opts), trained.tasks)
        if lines:
            raise ValueError("; ".join(lines))

        # Drawn before anything is trained on, so that no stage meets them.
        tasks = tasks_of(level for stage in stages for level in stage.levels)
        held_out = drawn_alike(lambda: hold_out(stages, opts.eval_seed, trained.trained), tasks, trained.machine)
        note = held_out.note()
        if note:
            trained.machine.say(note)
        keep_off(held_out, trained)
        if opts.arch == "addon":  # the planner/worker LM's run has checked its stages itself
            place = f"--model_name {opts.model_name}"
            check_texts(held_out, trained.prompt_format.tokenizer, opts.min_roundtrip, place, trained.machine.say)

        config = options.part(
            StageLoopConfig, opts, settings=options.rerun_text(opts), flags=options.as_dict(opts)
        )
        return StageLoop(trained, config, stages, held_out, progress)

    def suite_subject(self) -> Subject | None:
        """What --eval_suite measures: the end of the last stage, or what --eval_only evaluated."""
        if self.supervised is None:
            return None
        if not self.finished:
            return self.supervised.suite_subject()

        trained = self.stage_loop.trained
        if not trained.machine.is_main:
            return None

        weights = trained.trainer.evaluation_weights
        record = self.stage_loop.record
        return Subject(trained.text_models, "bare LLM", weights, record, reserved_sums, trained.trained)


def keep_off(held_out: HeldOut, trained: TrainedModel) -> None:
    """Reserves what the supervised run keeps off, too; says which held-out questions it may have trained on."""
    if not trained.reserved:  # the planner/worker LM's run has said it itself
        return

    new = len(held_out.reserved - trained.reserved)
    if new and not trained.trained.is_whole:
        trained.machine.say(unreserved(new, len(held_out.reserved)))
    held_out.reserved |= trained.reserved
