"""The loop of every run: train, log, evaluate, save, stop in order, resume. What is trained, a subclass says."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import signal
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate import Accelerator
from accelerate.utils import gather_object, set_seed

import options
from engine.files import write_text_aside
from engine.logs import Progress, RunLog
from engine.machine import interruptible, peak_memory, pick_device, pick_precision, run_folder
from engine.optimization import BaseTrainer, NonFiniteError, learning_rate
from engine.state import RunState, load_run, save_run
from suite.measure import run_suite
from suite.questions import SuiteItem, parse_suite
from text_model import TextModel

NON_FINITE_EXIT = 3


class RunLoop:
    """A run from its options, new or going on from `checkpoint`.

    Subclasses implement what stands under "a system's own".

    Raises:
        ValueError: the user's mistakes, before anything is written.
    """

    metric = "solved"  # what --save_best_model compares
    compared_with = "bare LLM"  # the column beside the model's in the suite
    unit = "ex"
    handlers: tuple[Any, ...] = ()  # of accelerate

    trainer: BaseTrainer

    def __init__(self, opts: argparse.Namespace, checkpoint: Path | None):
        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        self.opts, self.checkpoint = opts, checkpoint
        device = pick_device(opts.device)
        if opts.num_threads:
            torch.set_num_threads(opts.num_threads)
        self.accelerator = Accelerator(cpu=device == "cpu", kwargs_handlers=list(self.handlers))
        self.device = self.accelerator.device
        self.precision = pick_precision(opts.mixed_precision, device)
        self.rank, self.world = self.accelerator.process_index, self.accelerator.num_processes
        self.is_main = self.accelerator.is_main_process
        self.build_data()
        self.folder = self._folder()
        set_seed(opts.seed)
        self.trainer = self.build_trainer()
        self.step, self.elapsed, self.best, self.extra = 0, 0.0, None, {}
        self._last_evaluated = -1
        if checkpoint:
            self._restore(checkpoint)
        self.total_steps = self._total_steps()

    # --- a system's own ---

    def build_data(self) -> None:
        """Evaluation data, and training batches unless --eval_only."""
        raise NotImplementedError

    def build_trainer(self) -> BaseTrainer:
        """The model and what trains it."""
        raise NotImplementedError

    def label(self) -> str:
        """What an unnamed run's folder is called after."""
        raise NotImplementedError

    def introduce(self) -> str:
        """The first line: model and data."""
        raise NotImplementedError

    def next_batches(self) -> list[Any]:
        """The micro-batches of this rank for one batch."""
        raise NotImplementedError

    def position(self) -> dict[str, Any]:
        """Position in the training data, JSON-able."""
        raise NotImplementedError

    def set_position(self, position: dict[str, Any]) -> None:
        raise NotImplementedError

    def data_size(self) -> int:
        """Items of one epoch."""
        raise NotImplementedError

    def evaluate(self) -> Any:
        """Evaluates the weights as they are; writes CSV and predictions."""
        raise NotImplementedError

    def table(self, evaluation: Any) -> str:
        """The evaluation in a few lines."""
        raise NotImplementedError

    def value(self, evaluation: Any) -> float:
        """What --save_best_model compares; more is better."""
        raise NotImplementedError

    def finish(self, evaluation: Any) -> None:
        """The closing words."""
        raise NotImplementedError

    def text_models(self) -> tuple[TextModel, TextModel | None]:
        """(the model, what it is compared with) as --eval_suite sees them."""
        raise NotImplementedError

    def suite_items(self, items: list[SuiteItem]) -> list[SuiteItem]:
        """The entries of the suite, changed where this system has been trained on what one would ask."""
        return items

    def describe(self, batches: list[Any]) -> list[dict[str, Any]]:
        """The examples of batches, readable, for the record of a bad one."""
        raise NotImplementedError

    def parts(self) -> dict[str, Any]:
        """Name -> module whose parameters --dry_run counts."""
        raise NotImplementedError

    def card(self, evaluation: Any | None) -> str:
        """The checkpoint's README.md."""
        raise NotImplementedError

    def show_samples(self, progress: Progress) -> None:
        """Prompt, target and prediction of a few evaluation items, others each time."""
        raise NotImplementedError

    def shown(self, metrics: dict[str, float]) -> dict[str, str]:
        """Further fields of the progress line."""
        return {}

    def alarms(self, metrics: dict[str, float]) -> list[str]:
        """What the user should know of the last batch at once, one line each."""
        return []

    def after_evaluation(self, evaluation: Any) -> None:
        """Called on every evaluation while training, before anything is saved."""

    def saves_after_evaluation(self) -> bool:
        """Whether every evaluation is followed by a checkpoint."""
        return False

    def ended_early(self) -> str | None:
        """Why training ends before its limit, in words."""
        return None

    def is_done(self) -> bool:
        """Whether nothing is left to do, not even an evaluation: said, and the run returns."""
        return False

    # --- set up ---

    def _folder(self) -> Path:
        """The run's folder: that of the checkpoint it goes on from, else a named or dated one."""
        name = gather_object([f"{self.label()[:60]}-{datetime.now():%Y%m%d-%H%M%S}"])[0]
        return run_folder(self.opts, self.checkpoint) or Path(self.opts.save_dir) / name

    def _total_steps(self) -> int | None:
        """Batches of the whole run; None: only time limits it. Typed epochs or minutes replace the default steps."""
        opts = self.opts
        steps = opts.max_steps
        typed = getattr(opts, "typed", set())  # on the command line, which wins over a file's steps
        replaced = {"epochs", "max_minutes"} & typed and "max_steps" not in typed
        if (opts.epochs or opts.max_minutes) and (replaced or "max_steps" not in opts.explicit):
            steps = opts.max_steps = 0
        if opts.epochs and not opts.eval_only:
            per_step = opts.batch_size * opts.grad_accum_steps * self.world
            by_epochs = math.ceil(opts.epochs * self.data_size() / per_step)
            steps = min(steps, by_epochs) if steps else by_epochs
        return steps or None

    def say(self, text: str) -> None:
        """A line for the user, from one rank."""
        if self.is_main:
            print(text, file=sys.stderr, flush=True)

    # --- commands ---

    def go(self) -> int:
        """Trains, evaluates and saves, or what --eval_only and --dry_run ask for. Returns the exit status."""
        opts = self.opts
        limit = f"{self.total_steps} steps" if self.total_steps else f"{opts.max_minutes} minutes"
        work = "evaluation only" if opts.eval_only else f"{limit} of {opts.batch_size} examples"
        self.say(f"{self.introduce()}; {work}" + (f", from step {self.step}" if self.step else ""))
        if self.world > 1:
            self.say(f"{self.world} processes, {opts.batch_size * self.world} examples a batch")
        if opts.dry_run:
            return self._dry_run()
        if not opts.eval_only and self.is_done():
            return 0
        csv = Path(opts.log_csv) if opts.log_csv else None
        with RunLog(
            self.folder, csv, options.names(opts.trackers), options.as_dict(opts), self.is_main, self.elapsed
        ) as self.log:
            if opts.eval_only:
                self.finish(self.evaluated())
                self._suite()
                return 0
            if self.checkpoint and self.step:
                self.log.truncate_after(self.step, evaluate=self._progress_share() >= 1)
            status = self._train()
            if status:
                return status
            if self._last_evaluated != self.step:
                self.save()  # an evaluation cut short must not cost what was trained
                self.evaluated()
            evaluation = self._evaluation
            self.save(evaluation)
            self.finish(evaluation)
            self._suite()
        return 0

    def _suite(self) -> None:
        """`--eval_suite`: measured once, on the first rank, on the weights as they are."""
        opts = self.opts
        if not opts.eval_suite or not self.is_main:
            return
        with self.trainer.evaluation_weights(), Progress(None, "suite", "item") as progress:
            model, bare = self.text_models()
            found = run_suite(
                model, self.suite_items(parse_suite(opts.eval_suite)), opts.eval_suite_n, opts.eval_seed, bare,
                opts.allow_unconfined_code, lambda name, done, total: progress.update(done, entry=name, of=total),
                opts.max_new_tokens,
            )
        self.log.eval_rows(found.rows(self.step, self.log.elapsed_s))
        self.log.predictions(found.predictions(self.step))
        print("\n".join(found.table(self.compared_with)))

    def _dry_run(self) -> int:
        """One forward and backward on one real batch: loss, parameter counts, estimated time and memory of the run."""
        times = []
        first = self.opts.hrm_gate_warmup_steps  # before it, a hybrid's batch costs less
        for step in range(first, first + 3):  # the first call pays for warming up
            batches = self.next_batches()
            started = time.perf_counter()
            try:
                metrics = self.trainer.step(batches, step, lr=0.0)
            except NonFiniteError as error:
                self.say(f"{options.PROG}: {error}: training would stop here; nothing was written")
                return NON_FINITE_EXIT
            times.append((time.perf_counter() - started) / metrics["segments"])
        seconds = min(times) * self.mean_segments()
        steps = self.total_steps
        asked = f"{self.opts.max_minutes} minutes"
        total = f"about {seconds * steps / 60:.1f} minutes for {steps} steps" if steps else asked
        self.say(f"loss {metrics['loss']:.4f}, gradient norm {metrics['grad_norm']:.3f}")
        for name, module in self.parts().items():
            self.say(f"  {name:16s} {sum(p.numel() for p in module.parameters() if p.requires_grad):>12,} parameters")
        self.say(f"{seconds:.2f} s a step of {self.opts.batch_size} examples: {total}, evaluation aside")
        self.say(f"peak memory {peak_memory(self.device) / 2**30:.2f} GiB; nothing was written")
        return 0

    def mean_segments(self) -> float:
        """Segments of an average step, whose time --dry_run measures one by one."""
        return 1.0

    # --- training ---

    def _progress_share(self) -> float:
        """How much of the run is done, 0 to 1, by the limit that is nearer; alike on all ranks, which end together."""
        by_steps = self.step / self.total_steps if self.total_steps else 0.0
        by_time = 0.0
        if self.opts.max_minutes:
            seconds = torch.tensor(self.log.elapsed_s, device=self.device)
            by_time = float(self.accelerator.reduce(seconds, "mean")) / (60 * self.opts.max_minutes)
        return min(max(by_steps, by_time), 1.0)

    def _train(self) -> int:
        """The loop. Returns 0 when done, or the exit status of an early but orderly end."""
        opts = self.opts
        warmup = min(opts.warmup_steps, (self.total_steps or opts.warmup_steps * 2) // 2)
        if warmup < opts.warmup_steps and "warmup_steps" in opts.explicit:
            self.say(f"WARNING: --warmup_steps {opts.warmup_steps} is cut to {warmup}, half of the run")
        progress = Progress(self.total_steps, "step", self.unit, start=self.step, enabled=self.is_main)
        with interruptible() as stop, progress:
            clock, seen, read = time.monotonic(), 0, 0
            while (share := self._progress_share()) < 1 and not self.ended_early():
                try:
                    batches = self.next_batches()
                except ValueError:  # a bad line: what was trained is kept
                    if self.step:
                        self.save()
                    raise
                self.trainer.progress = share
                lr = learning_rate(opts, self.step, share, warmup)
                try:
                    metrics = self.trainer.step(batches, self.step, lr)
                except NonFiniteError as error:
                    return self._not_finite(error, batches)
                self.step += 1
                seen, read = seen + metrics["examples"], read + metrics.pop("tokens_read", 0)
                seconds = time.monotonic() - clock
                speed = {"examples_per_second": seen / seconds}
                speed |= {"tokens_per_second": read / seconds} if read else {}
                shown = metrics.get("answer_loss", metrics["loss"])
                progress.update(self.step, loss=shown, lr=lr, **self.shown(metrics), rate=(read or seen) / seconds)
                self._after_step(metrics | speed, progress)
                if self._anyone(stop.signal is not None):
                    self.save()
                    self.say(f"stopped at step {self.step}, saved; go on with: python train.py --resume {self.folder}")
                    return 128 + (stop.signal or signal.SIGTERM)
        if self.ended_early():
            self.say(f"training ended at step {self.step}: {self.ended_early()}")
        return 0

    def _anyone(self, flag: bool) -> bool:
        """True on all ranks as soon as it is on one."""
        if self.world == 1:
            return flag
        return bool(self.accelerator.reduce(torch.tensor(int(flag), device=self.device), "sum"))

    def _after_step(self, metrics: dict[str, float], progress: Progress) -> None:
        opts, step = self.opts, self.step
        if step % opts.log_steps == 0 or step == self.total_steps:
            self.log.log(step, **metrics)
        for alarm in self.alarms(metrics):
            progress.say(f"WARNING: step {step}: {alarm}")
        if opts.log_samples_every and step % opts.log_samples_every == 0:
            self.show_samples(progress)
        evaluation = None
        if opts.eval_every and step % opts.eval_every == 0:
            evaluation = self.evaluated()
            self.after_evaluation(evaluation)
            progress.say(f"step {step}\n{self.table(evaluation)}")
        due = opts.save_every and step % opts.save_every == 0
        if due or (evaluation and (self.saves_after_evaluation() or self._is_best(evaluation))):
            self.save(evaluation)

    def _not_finite(self, error: NonFiniteError, batches: list[Any]) -> int:
        """Keeps the weights, which are those before the bad step, and the batch that would have spoilt them."""
        self.save()
        path = self.folder / "bad_batch.json"
        if self.is_main:
            write_text_aside(path, json.dumps({"step": self.step, "examples": self.describe(batches)}, indent=1))
        self.say(f"{options.PROG}: {error}: stopped before the step; the weights are saved, the batch is in {path}")
        return NON_FINITE_EXIT

    def evaluated(self) -> Any:
        """`evaluate`, remembered as that of this step."""
        evaluation = self.evaluate()
        self._last_evaluated, self._evaluation = self.step, evaluation
        return evaluation

    def _is_best(self, evaluation: Any) -> bool:
        value = self.value(evaluation)
        return self.opts.save_best_model and math.isfinite(value) and (self.best is None or value > self.best)

    # --- checkpoints ---

    def save(self, evaluation: Any | None = None) -> None:
        """Writes the whole state of the run at this step."""
        if not self.is_main:
            return
        is_best = evaluation is not None and self._is_best(evaluation)
        if is_best:
            self.best = self.value(evaluation)
        state = RunState(self.step, self.log.elapsed_s, self.best, self.position(), self.extra)
        save_run(self.folder, self.opts, self.trainer, state, self.card(evaluation), self.metric, is_best)

    def _restore(self, folder: Path) -> None:
        state, notes = load_run(folder, self.opts, self.trainer)
        self.step, self.elapsed, self.best, self.extra = state.step, state.elapsed_s, state.best, state.extra
        if state.stream and not self.opts.eval_only:
            self.set_position(state.stream)
        for note in notes:
            self.say(note)


def closing_words(csv: Path, checkpoint: Path | None, curve: Path | None, question: str | None, *,
                  samples: Path | None = None, compare: bool = True) -> str:
    """Where a run has left its files, one a line, and the command that puts `question` to its checkpoint."""
    left = [("evaluation:", csv), ("samples:", samples), ("checkpoint:", checkpoint), ("curve:", curve)]
    lines = [f"{what:11} {path}" for what, path in left if path]
    if question:
        asked = shlex.quote(" ".join(question.split()))
        lines.append(f"next:       python generate.py --checkpoint {shlex.quote(str(checkpoint))} "
                     f"{'--compare ' if compare else ''}--prompt {asked}")
    return "\n".join(lines)
