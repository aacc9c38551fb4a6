"""The loop of every run: train, log, evaluate, save, stop in order, go on.

A system (the add-on, the hybrid, the planner/worker LM) plugs in by handing over objects. Nothing is subclassed.

    data        where the batches come from             `Data`
    trainer     what one batch does to the weights      `engine.optimization.BaseTrainer`
    evaluator   what the weights are worth              `Evaluator`, which returns `engine.report.Report`
    facts       names and figures that do not change    `Facts`
    hooks       six occasions to add something          `Hooks`, each of which does nothing by default

A system's run class builds them in this order, which fixes the order of all random draws:

    machine = start_machine(...)         device, processes, precision
    data = ...                           draws the evaluation items first, then opens the training stream
    set_seed(seed)                       so the first weights depend on the seed alone
    trainer = ...                        builds the model
    evaluator, facts, hooks = ...
    loop = RunLoop(config, machine, data, trainer, evaluator, facts, hooks, checkpoint)
    status = loop.go()

The constructor restores the checkpoint, if there is one. `go` runs the whole command and returns its exit status.
The evaluation suite is no part of it: `train.py` measures it on a run whose `finished` is true.

What changes while a run goes on lies in three places only, and a checkpoint keeps all of them: the trainer (weights,
optimizers, averages), the data (`Data.state`) and the loop (`engine.state.RunState`, with `Hooks.extra` inside).
"""

from __future__ import annotations

import json
import math
import signal
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import options
from engine.beginning import check_untouched, folder_of, introduce
from engine.checkpoints import newest_checkpoint, remove_leftovers, step_folder
from engine.dry_run import NON_FINITE_EXIT, dry_run
from engine.figures import draw_curve
from engine.files import shell_path, write_text_aside
from engine.fit import fitted
from engine.limits import Warmup, limits_of
from engine.logs import RunLog
from engine.machine import Machine
from engine.nonfinite import LeftOut
from engine.optimization import BaseTrainer, NonFiniteError, check_weights
from engine.page import page_of_run
from engine.patience import Patience
from engine.progress import Progress, Speed
from engine.report import Report, closing_words, stamped
from engine.schedule import learning_rate
from engine.state import RunState, load_run, save_run
from engine.stopping import Stop, StopRequested, interruptible, leavable
from engine.system import Data, Evaluator, Facts, Hooks, LoopConfig


@dataclass(eq=False)
class KeptRun:
    """A run's parts and how far it is; what it writes down of itself, and how it comes back from `checkpoint`.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    config: LoopConfig
    machine: Machine
    data: Data
    trainer: BaseTrainer
    evaluator: Evaluator
    facts: Facts
    hooks: Hooks = field(default_factory=Hooks)
    checkpoint: Path | None = None

    def __post_init__(self) -> None:
        self.step = 0  # batches done
        self.best: float | None = None  # best `Report.value` so far
        self.report: Report | None = None  # the newest evaluation's
        self.finished = False  # True once the closing evaluation is written
        self._log: RunLog | None = None  # open while the run trains or evaluates
        self._elapsed_before = 0.0  # seconds of the run before this process
        self._evaluated_at = -1
        self._owes_evaluation = False  # the newest step's was left when the run was told to stop
        self._alone = self.machine.world == 1

        self.folder = folder_of(self.config, self.facts.label, self.checkpoint)
        self.patience = Patience(self.config)
        self.left_out = LeftOut(self.config.on_nonfinite)
        self._set_length(self.config)
        if self.checkpoint:
            self._restore(self.checkpoint)

    def _set_length(self, config: LoopConfig) -> None:
        self.config = config
        self.limits = limits_of(config, self.data, self.machine)
        self.warmup = Warmup(self.limits, self.limits.warmup(config.warmup_steps))

    @property
    def elapsed_s(self) -> float:
        """Seconds of the run, those before a resume included."""
        if self._log is None:
            return self._elapsed_before
        return self._log.elapsed_s

    @property
    def log(self) -> RunLog:
        """The records, once they are open."""
        assert self._log is not None
        return self._log

    def _share(self) -> float:
        """How much of the run is done, 0 to 1."""
        return self.limits.share(self.step, self.elapsed_s)

    # --- evaluation and checkpoints ---

    def _evaluate(self, share: float | None = None) -> Report:
        """Measures, writes the figures down and tells the hooks; `share` as in `Hooks.after_evaluation`.

        Raises StopRequested or NonFiniteError, before anything is written down.
        """
        check_weights(self.trainer.parameters, self.step)
        with leavable(self._alone):
            report = self.evaluator.evaluate(self.step)
        self.record(report)
        self.report = report
        self._evaluated_at = self.step
        self.hooks.after_evaluation(self.step, report, share)
        if share is not None:
            self.patience.update(self.step, report)
        return report

    def ended_early(self) -> str | None:
        """Why training ends before its limit, in words; None: it goes on."""
        return self.hooks.ended_early() or self.patience.ended()

    def record(self, report: Report) -> None:
        """Writes rows and predictions at this step."""
        rows = stamped(report.rows, self.step, self.log.elapsed_s)
        self.log.evaluation(self.step, rows, stamped(report.predictions, self.step), report.tokens)

        # What is measured after the end belongs on the page, too.
        if self.finished and self.config.report and self.machine.is_main:
            page_of_run(self.folder, self.log.csv_path)

    def _is_best(self, report: Report) -> bool:
        if not self.config.save_best_model or not math.isfinite(report.value):
            return False
        return self.best is None or report.value > self.best

    def save(self, report: Report | None = None, position: dict[str, Any] | None = None) -> None:
        """Writes the whole state of the run at this step, with the evaluation of this step where there is one.

        `position` is that in the training items; None = where they are now.
        Raises NonFiniteError rather than keep weights that nothing can go on from.
        """
        check_weights(self.trainer.parameters, self.step)
        if not self.machine.is_main:
            return
        is_best = False
        if report is not None and self._is_best(report):
            is_best = True
            self.best = report.value

        stream = self.data.state() if position is None else position
        state = RunState(
            self.step, self.elapsed_s, self.best, stream, self.hooks.extra, self.warmup.document(),
            self._owes_evaluation, self.patience.document(), self.left_out.document(),
        )
        table = ""
        if report:
            table = report.table
        card = self.facts.card.text(self.step, table)
        owner = self.log.claim.document()
        metric = self.facts.metric
        kept = self.data.documents()
        save_run(self.folder, self.config, self.trainer, state, card, owner, metric, is_best, kept)

    def _restore(self, folder: Path) -> None:
        """Weights and state of the checkpoint in `folder`; the weights alone with --eval_only and --reset_progress."""
        saved = load_run(folder, self.config, self.trainer)
        self.step = saved.state.step
        self.best = saved.state.best
        self._elapsed_before = saved.state.elapsed_s
        self.warmup.seconds = saved.state.warmup_s
        self._owes_evaluation = saved.state.owes_evaluation and is_due(self.config.eval_every, self.step)
        self.patience.restore(saved.state.patience, saved.state.extra)
        self.left_out.restore(saved.state.left_out)
        self.hooks.extra = saved.state.extra
        notes = saved.notes + self.hooks.restored(saved.flags)

        # The hooks come first: a position in the data may be one of a curriculum's level.
        if saved.state.stream and not self.config.eval_only:
            self.data.load_state(saved.state.stream)
        for note in notes:
            self.machine.say(note)


class RunLoop(KeptRun):
    """A run, new or going on from `checkpoint`: what it does, batch after batch.

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    # --- commands ---

    def go(self) -> int:
        """Trains, evaluates and saves, or what --eval_only and --dry_run ask for. Returns the exit status."""
        config = fitted(self.config, self.machine, self.data, self.trainer, self.step)
        if config is not self.config:  # else the warmup keeps the seconds that a checkpoint brought
            self._set_length(config)
        introduce(config, self.machine, self.facts, self.warmup, self.step)
        if config.dry_run:
            return dry_run(config, self.machine, self.data, self.trainer, self.facts, self.limits)

        # A finished run of a system that says so is left untouched: not even the logs are opened.
        if not config.eval_only:
            words = self.hooks.nothing_to_do(
                self.step, self.limits.total_steps, self._share(), self.ended_early()
            )
            if words is not None:
                if self.machine.is_main:
                    remove_leftovers(self.folder)
                if words:
                    self.machine.say(f"{self.folder} {words}")
                return 0

        # From here on the run leaves files behind.
        csv = Path(config.log_csv) if config.log_csv else None
        trackers = options.names(config.trackers)
        flags = dict(config.flags)
        alone = not config.eval_only
        with RunLog(self.folder, csv, trackers, flags, self.machine.is_main, self._elapsed_before, alone) as self._log:
            try:
                if config.eval_only:
                    self._close(self._evaluate())
                    return 0
                if self.machine.is_main:
                    check_untouched(self.folder, self.checkpoint, config.resume, config.run_name)
                return self._train_and_close()
            except NonFiniteError as error:
                self.machine.say(f"{options.PROG}: {error}: nothing of them is saved; {self._way_back()}")
                return NON_FINITE_EXIT

    def _train_and_close(self) -> int:
        """Everything after the logs are open. Returns the exit status."""
        # What an earlier process recorded after the checkpoint goes; without one, all that the run has recorded.
        is_over = self._share() >= 1 or self.ended_early() is not None
        self.log.truncate_after(self.step, evaluate=is_over or self.step == 0)
        status = self._train()
        if status:
            return status

        # An evaluation that is cut short must not cost what was trained: save before it, and again with its figures.
        report = self.report
        if report is None or self._evaluated_at != self.step:
            self.save()
            report = self._evaluate()
        self.save(report)
        self._close(report)
        return 0

    def _close(self, report: Report) -> None:
        """Marks the end, and tells it."""
        self.finished = True
        if self.machine.is_main:
            print(self.left_out.closing(), end="")
            newest = self.checkpoint
            next_stage = None
            if not self.config.eval_only:
                newest = step_folder(self.folder, self.step)
                next_stage = self.facts.next_stage.format(step=self.step)
            tell_end(report, self.log, newest, self.facts.compare, next_stage, self.config.report)

    # --- training ---

    def _train(self) -> int:
        """Batch after batch. Returns 0 when done, or the exit status of an early but orderly end."""
        # What the random weights can do, where the system records it.
        if self.step == 0:
            untrained = self.evaluator.before_training()
            if untrained:
                self.record(untrained)
                self.machine.say(untrained.table)

        # Ctrl-C and SIGTERM are looked at between two batches, where everything can be saved, and amid evaluations.
        progress = Progress(
            self.limits.total_steps, "step", self.facts.unit, start=self.step, enabled=self.machine.is_main
        )
        with interruptible() as stop, progress:
            speed = Speed()
            if self._owes_evaluation:
                if not self._evaluate_in_turn(progress) or self.machine.any_process(stop.signal is not None):
                    return self._stopped(stop)
            while (share := self._share()) < 1 and not self.ended_early():
                status = self._batch(share, speed, progress, stop)
                if status:
                    return status

        reason = self.ended_early()
        if reason:
            self.machine.say(f"training ended at step {self.step}: {reason}")
        return 0

    def _batch(self, share: float, speed: Speed, progress: Progress, stop: Stop) -> int:
        """One batch and all that follows it. Returns 0, or the exit status when the run must end here."""
        # A bad line in the data ends the run with the user's mistake told; what was trained is kept.
        position = self.data.state()
        try:
            with leavable(self._alone):
                batches = self.data.next_batches()
        except StopRequested:
            return self._stopped(stop, position)
        except ValueError:
            if self.step:
                self.save()
            raise

        # One update, or one for each segment. A loss that is no number is found before the weights move.
        self.trainer.progress = share
        warmed = self.warmup.share(self.step, self.elapsed_s)
        lr = learning_rate(self.config, self.step, share, self.warmup.steps, warmed)
        try:
            metrics = self.trainer.step(batches, self.step, lr)
        except NonFiniteError as error:
            check_weights(self.trainer.parameters, self.step)  # else no batch is at fault
            if not self.left_out.another():
                return self._not_finite(error, batches)
            self._leave_out(error, progress)
        else:
            self._count(metrics, lr, speed, progress)
        self._take_turns(progress)

        # The ranks end together: a signal may have reached one of them only.
        if self.machine.any_process(stop.signal is not None):
            return self._stopped(stop)
        return 0

    def _leave_out(self, error: NonFiniteError, progress: Progress) -> None:
        """Counts a batch whose step is left out, and tells it; the weights are those before it."""
        self.step += 1
        self.log.log(self.step, loss=error.loss, grad_norm=error.norm, **self.left_out.metrics)
        progress.say(f"WARNING: {error}: the batch is left out ({self.left_out.count} so far)")

    def _count(self, metrics: dict[str, float], lr: float, speed: Speed, progress: Progress) -> None:
        """Counts a batch that was trained on; progress line, records and alarms."""
        self.step += 1
        self.left_out.good()
        rates = speed.update(metrics["examples"], metrics.pop("tokens_read", 0))
        loss = metrics.get("answer_loss", metrics["loss"])
        rate = rates.get("tokens_per_second", rates["examples_per_second"])
        progress.update(self.step, loss=loss, lr=lr, **self.hooks.shown(metrics), rate=rate)

        if self.step % self.config.log_steps == 0 or self.step == self.limits.total_steps:
            self.log.log(self.step, **metrics, **rates, **self.left_out.metrics)
        for alarm in self.hooks.alarms(self.step, metrics | rates):
            progress.say(f"WARNING: step {self.step}: {alarm}")

    def _stopped(self, stop: Stop, position: dict[str, Any] | None = None) -> int:
        """Saves what there is, tells how to go on, and returns the exit status; `position` as `save` takes it."""
        status = 128 + (stop.signal or signal.SIGTERM)
        if not self.step:
            self.machine.say("stopped before the first step: there is nothing to save")
            return status
        self.save(position=position)
        self.machine.say(f"stopped at step {self.step}, saved; go on with: {resume_command(self.folder)}")
        return status

    def _take_turns(self, progress: Progress) -> None:
        """Samples, evaluation and checkpoint, each where its turn has come."""
        config = self.config
        step = self.step
        if is_due(config.log_samples_every, step):
            for text in self.evaluator.samples(step // config.log_samples_every):
                progress.say(f"[step {step}] {text}")

        self._owes_evaluation = is_due(config.eval_every, step)
        if self._owes_evaluation:
            self._evaluate_in_turn(progress)
        elif is_due(config.save_every, step):
            self.save()

    def _evaluate_in_turn(self, progress: Progress) -> bool:
        """The evaluation that is due at this step, and the checkpoint; False where a signal ended it."""
        try:
            report = self._evaluate(self._share())
        except StopRequested:
            return False
        self._owes_evaluation = False
        progress.say(f"step {self.step}\n{report.table}")

        # An evaluation alone may be reason enough to save.
        worth_saving = self.facts.saves_every_evaluation or self._is_best(report)
        if worth_saving or is_due(self.config.save_every, self.step):
            self.save(report)
        return True

    def _way_back(self) -> str:
        """What to do where the weights are lost."""
        if self.config.eval_only:
            return "give an earlier checkpoint"
        newest = newest_checkpoint(self.folder)
        if newest is None:
            return "begin anew with a lower --lr"
        return f"go on from {newest} with a lower --lr"

    def _not_finite(self, error: NonFiniteError, batches: list[Any]) -> int:
        """Keeps the weights, which are those before the bad step, and the batch that would have spoilt them."""
        self.save()
        path = self.folder / "bad_batch.json"
        if self.machine.is_main:
            record = {"step": self.step, "examples": self.data.describe(batches)}
            write_text_aside(path, json.dumps(record, indent=1))
        self.machine.say(
            f"{options.PROG}: {error}{self.left_out.reason()}: stopped before the step; the weights are saved, the "
            f"batch is in {path}"
        )
        return NON_FINITE_EXIT


def tell_end(
    report: Report, log: RunLog, newest: Path | None, compare: bool, next_stage: str | None, has_page: bool
) -> None:
    """The closing words: table, files, next command, or `next_stage` in place of files and command."""
    print(report.table)
    if report.notes:
        print(report.notes)
    if next_stage:
        print(next_stage, flush=True)
        return
    curve = draw_curve(log.folder, log.csv_path, log.run)
    page = page_of_run(log.folder, log.csv_path) if has_page else None
    print(closing_words(log.csv_path, newest, curve, report.question, compare=compare, page=page))


def resume_command(folder: Path) -> str:
    """What the user types to go on with the run in `folder`."""
    return f"python {options.PROG} --resume {shell_path(folder)}"


def is_due(every: int, step: int) -> bool:
    """Whether something that happens every `every` batches (0: never) happens after batch `step` (from 1)."""
    return every > 0 and step % every == 0
