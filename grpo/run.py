"""A GRPO run: the warm start, then stage after stage, each skipped when finished and gone on with when interrupted."""

from __future__ import annotations

import argparse
import csv
import hashlib
import json
import signal
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import addon_run
import options
from addon.adapters import ADAPTER, adapter_document
from addon_run import AddonRun
from engine.checkpoints import (
    newest_checkpoint,
    read_checkpoint,
    rotate,
    step_folder,
    write_checkpoint,
)
from engine.dry_run import NON_FINITE_EXIT
from engine.files import write_text_aside
from engine.logs import RunLog, draw_curve
from engine.machine import Machine, interruptible
from engine.optimization import NonFiniteError, model_weights
from engine.report import Card, Report, closing_words
from engine.state import CONFIG
from enhanced.training import model_documents
from grpo import warm_start
from grpo.measure import Change, Measured, change_table, measure
from grpo.problems import training_problems
from grpo.stages import HeldOut, Stage, StagesConfig, hold_out, rewards_of, stages_of
from grpo.warm_start import EnhancedRun, unreserved
from reasoning_gym_wrapper import make_tasks, reserved_sums, train_seed
from suite.after_run import Subject

PROGRESS = "grpo.json"  # in a checkpoint: which stages lie behind it
STAGES, SAMPLES = "stages", "samples"  # folders in the run
SEED_OF_STAGE = 7  # apart from the warm start's items: each stage draws from a seed of its own


@dataclass
class Progress:
    """How far a run has come: optimizer steps in all, and the value of every metric at the end of each stage."""

    step: int
    done: dict[str, dict[str, float]] = field(default_factory=dict)
    start: dict[str, dict[str, float]] = field(default_factory=dict)  # the same, where the stage began
    asked: dict[str, dict[str, Any]] = field(default_factory=dict)  # `asked_of` each, for both
    elapsed_s: float = 0.0


def problems(opts: argparse.Namespace, checkpoint: Path | None = None) -> list[str]:
    """Everything wrong with a GRPO run that can be found without loading a model, one line each."""
    if opts.arch == "enhanced":
        return warm_start.problems(opts, checkpoint)

    lines = addon_run.problems(opts, checkpoint)
    if checkpoint is None:
        return ["--arch addon --objective grpo needs --resume CHECKPOINT, one trained with --objective ce", *lines]
    try:
        tasks = make_tasks(addon_run.task_names(opts), addon_run.task_config(opts))
    except ValueError:  # what is wrong with the tasks is among the lines
        return lines
    return lines + stages_of(options.part(StagesConfig, opts), tasks)[1]


class GrpoRun:
    """A run of `--objective grpo`, new or going on from `checkpoint`.

    Raises:
        ValueError: the user's mistakes.
    """

    problems = staticmethod(problems)

    def __init__(self, opts: argparse.Namespace, checkpoint: Path | None):
        self.opts, self.checkpoint = opts, checkpoint
        self.addon = opts.arch == "addon"
        self.run: AddonRun | EnhancedRun | None = None  # the supervised run whose weights GRPO moves
        self.machine: Machine | None = None
        self.finished = False

    def go(self) -> int:
        """Runs what is left to do, or what --eval_only and --dry_run ask for. Returns the exit status."""
        kind = AddonRun if self.addon else EnhancedRun
        if self.opts.eval_only or self.opts.dry_run:  # of the supervised run
            self.run = kind(self.opts, self.checkpoint)
            return self.run.go()
        goes_on = self.checkpoint and not self.opts.reset_progress
        progress = read_progress(self.checkpoint) if goes_on else None
        opts = self.opts
        if progress is not None or self.addon:  # weights alone: what trained them before is over
            opts = options.Options(**vars(opts) | {"eval_only": True})
            opts.explicit = self.opts.explicit
        self.run = kind(opts, self.checkpoint)
        self.machine = self.run.machine
        if progress is None and not self.addon:
            status = self.run.go()
            if status:
                return status
        loop = self.run.loop
        folder = loop.folder
        self.checkpoint = newest_checkpoint(folder) if not self.addon else self.checkpoint
        self.progress = progress or Progress(loop.step, elapsed_s=loop.elapsed_s)
        self.model, self.format = self.run.model, self.run.format
        trainer = self.run.trainer
        if trainer.ema:
            trainer.ema.settle()  # the averaged weights are those that were evaluated and saved
        trainer.ema, trainer.optimizers = None, []  # the supervised run is over
        return self._stages(folder)

    def suite_subject(self) -> Subject | None:
        """What --eval_suite measures: the end of the last stage, or what --eval_only evaluated."""
        if not self.finished:
            return self.run.suite_subject() if self.run else None
        if not self.machine.is_main:
            return None
        weights = self.run.trainer.evaluation_weights
        return Subject(self.run.text_models, "bare LLM", weights, self._write, reserved_sums)

    def _write(self, report: Report) -> None:
        """Writes rows and predictions at the step of now."""
        here = {"step": self.progress.step}
        self.log.eval_rows([row | here | {"elapsed_s": self.log.elapsed_s} for row in report.rows])
        self.log.predictions([here | line | here for line in report.predictions])

    # --- stages ---

    def _stages(self, folder: Path) -> int:
        if self.addon and "max_completion_length" not in self.opts.explicit:
            # The answers of the tasks are as long as the evaluation of the checkpoint's run found. On a copy, since
            # the options are the caller's; checkpoints keep the number.
            explicit = self.opts.explicit
            self.opts = options.Options(**vars(self.opts) | {"max_completion_length": self.run.data.budget})
            self.opts.explicit = explicit
        config = options.part(StagesConfig, self.opts)
        stages, problems = stages_of(config, self.run.data.tasks if self.addon else ())
        if problems:
            raise ValueError("; ".join(problems))
        held = hold_out(stages, self.opts.eval_seed)
        if self.addon:
            self._keep_apart(held)
        csv = Path(self.opts.log_csv) if self.opts.log_csv else None
        document = options.as_dict(self.opts)
        main = self.machine.is_main
        with RunLog(folder, csv, options.names(self.opts.trackers), document, main, self.progress.elapsed_s) as log:
            self.log, self.folder = log, folder
            with interruptible() as stop:
                for index, stage in enumerate(stages):
                    if stage.name in self.progress.done:
                        self.machine.say(f"stage {stage.name} is finished, skipped")
                        continue
                    status = self._stage(stage, held, index, stop)
                    if status:
                        return status
            self._finish(stages, held)
        self.finished = True
        return 0

    def _keep_apart(self, held: HeldOut) -> None:
        """Reserves what the deep supervision evaluates, too; says which questions it may have trained on."""
        kept = self.run.data.reserve.questions
        new = len(held.reserved - kept)
        if new:
            self.machine.say(unreserved(new, len(held.reserved)))
        held.reserved |= kept

    def _stage(self, stage: Stage, held: HeldOut, index: int, stop: Any) -> int:
        """Runs one stage to its end. Returns 0, or the exit status of an early but orderly end."""
        from grpo.stage_trainer import StageRun, forget, newest_state, train_stage  # 7 s, and only where it is needed

        opts, base, place = self.opts, self.progress.step, self.folder / STAGES / stage.name
        functions, weights = rewards_of(stage, tags=not self.addon)
        seed = train_seed(opts.seed + SEED_OF_STAGE + index)
        problems = training_problems(stage.levels, stage.size, seed, held.reserved)
        self._open_stage(place, base)
        resumed = newest_state(place)
        steps = int(resumed.name.split("-")[1]) if resumed else 0
        self.log.truncate_after(base + steps, evaluate=steps > 0)  # an end whose checkpoint was never written
        before = self._start_of(stage, held, functions, place)
        self.machine.say(f"stage {stage.name}: {len(problems)} questions x {stage.epochs:g} epochs"
                      + (f", going on from {resumed.name}" if resumed else ""))
        run = StageRun(
            stage, place, functions, weights,
            log=lambda step, numbers: self._log(stage.name, base + step, numbers),
            stopped=lambda: stop.signal is not None,
            precision=self.machine.precision, device=self.machine.device.type,
        )
        try:
            finished, steps = train_stage(self.model, self.format, problems, run)
        except NonFiniteError as error:
            self.machine.say(f"{options.PROG}: {error}: stopped before the step; the newest state is in {place}")
            return NON_FINITE_EXIT
        if not finished:
            again = "the same command" if self.addon else f"python train.py --resume {self.folder}"
            self.machine.say(f"stopped in stage {stage.name} at its step {steps}, saved; go on with: {again}")
            return 128 + (stop.signal or signal.SIGTERM)
        self.progress.step = base + steps
        after = self._measure(stage, held, functions)
        self._record(stage, after, before)
        self._save(after)
        if self.machine.is_main:
            forget(place)
            print(f"after {after.line(before)}", flush=True)
        return 0

    def _open_stage(self, place: Path, base: int) -> None:
        """Makes the stage's folder; states of a run that began this stage from another step are removed."""
        from grpo.stage_trainer import forget

        mark = place / "begun_at.json"
        if place.exists() and (not mark.exists() or json.loads(mark.read_text()) != base):
            forget(place)
        place.mkdir(parents=True, exist_ok=True)
        write_text_aside(mark, json.dumps(base))

    def _start_of(self, stage: Stage, held: HeldOut, functions: Any, place: Path) -> dict[str, float]:
        """The stage's held-out metrics before its first step; measured once, and written down unless known already.

        Here the weights are those, of an interrupted stage as well: other questions or rewards are measured anew.
        """
        if stage.name not in self.progress.start:
            path, asked = place / "start.json", asked_of(stage, held)
            known = json.loads(path.read_text()) if path.exists() else {}
            if known.get("asked") != asked:
                start = self._measure(stage, held, functions)
                if not self._is_recorded(stage):
                    self.log.eval_rows(start.rows(self.progress.step))
                    self.log.predictions(start.predictions(self.progress.step))
                known = {"asked": asked, "metrics": start.means()}
                write_text_aside(path, json.dumps(known))
                self.machine.say(f"before {start.line()}")
            self.progress.start[stage.name], self.progress.asked[stage.name] = known["metrics"], asked
        return self.progress.start[stage.name]

    def _is_recorded(self, stage: Stage) -> bool:
        """Whether the CSV holds the stage's figures of this step: the warm start ends with those of every stage."""
        if not self.log.csv_path.exists():  # on other ranks
            return False
        with open(self.log.csv_path, newline="", encoding="utf-8") as file:
            return any((row["step"], row["task"]) == (str(self.progress.step), stage.name)
                       for row in csv.DictReader(file))

    def _log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        self.log.log(step, stage=stage, **numbers)
        shown = {name: numbers[name] for name in ("reward", "frac_reward_zero_std", "entropy") if name in numbers}
        told = "  ".join(f"{name} {value:.3f}" for name, value in shown.items())
        self.machine.say(f"stage {stage} step {step}  {told}  {numbers.get('mean_length', 0):.0f} tokens  "
                      f"{numbers.get('step_time', 0):.1f} s a step")

    def _measure(self, stage: Stage, held: HeldOut, functions: Any) -> Measured:
        return measure(self.model, self.format, stage.name, held.problems[stage.name], functions,
                       stage.config.max_completion_length, not self.addon, self.opts.eval_batch_size,
                       self.run.trainer.autocast())

    def _record(self, stage: Stage, after: Measured, before: dict[str, float]) -> None:
        """CSV, predictions and sample completions of a finished stage."""
        self.progress.done[stage.name] = after.means()
        self.log.eval_rows(after.rows(self.progress.step, before))
        self.log.predictions(after.predictions(self.progress.step))
        if self.machine.is_main:
            place = self.folder / SAMPLES
            place.mkdir(exist_ok=True)
            lines = [json.dumps(sample, ensure_ascii=False) for sample in after.samples()]
            write_text_aside(place / f"{stage.name}.jsonl", "\n".join(lines) + "\n")

    def _save(self, after: Measured) -> None:
        """The checkpoint at the end of a stage."""
        if not self.machine.is_main:
            return
        self.progress.elapsed_s = self.log.elapsed_s
        settings = options.rerun_text(self.opts)
        documents = {PROGRESS: json.dumps(asdict(self.progress)), CONFIG: settings, "README.md": self._card(after)}
        if self.addon:
            weights = {ADAPTER: self.model.addon_state()}
            documents["adapter_config.json"] = adapter_document(self.model, self.opts)
        else:
            self.model.config.adaptive_cycles = False  # GRPO moves the states that the gate had learnt to judge
            weights = {"model": model_weights(self.model)}
            documents |= model_documents(self.model, self.format.tokenizer)
        folder = write_checkpoint(step_folder(self.folder, self.progress.step), weights, documents)
        write_text_aside(self.folder / CONFIG, settings)
        rotate(self.folder, self.opts.checkpoint_limit, keep=[folder])
        self.checkpoint = folder

    def _card(self, after: Measured) -> str:
        title = f"HRM add-on for {self.opts.model_name}" if self.addon else "Planner/worker LM"
        library = "peft" if self.addon else "transformers"
        card = Card(library, ["hrm", "grpo"], title, f"; GRPO stages done: {', '.join(self.progress.done)}.")
        return card.text(self.progress.step, after.line(self.progress.start.get(after.stage)))

    def _finish(self, stages: list[Stage], held: HeldOut) -> None:
        """The closing words: start and end of each stage, files, next command."""
        if not self.machine.is_main:
            return
        changes = []
        for stage in stages:
            if stage.name in self.progress.start:
                asked = self.progress.asked.get(stage.name) or asked_of(stage, held)
                start, end = self.progress.start[stage.name], self.progress.done[stage.name]
                changes.append(Change(stage.name, asked["rewards"], asked["n"], start, end))
        print(change_table(changes))
        curve = draw_curve(self.folder, self.log.csv_path)
        print(closing_words(self.log.csv_path, self.checkpoint, curve, held.problems[stages[-1].name][0].question,
                            samples=self.folder / SAMPLES))


def asked_of(stage: Stage, held: HeldOut) -> dict[str, Any]:
    """What a stage's held-out metrics are of: reward weights, number of questions, a digest of them."""
    problems = held.problems[stage.name]
    digest = hashlib.sha256("\n".join(problem.question for problem in problems).encode()).hexdigest()[:16]
    return {"rewards": dict(stage.rewards), "n": len(problems), "questions": digest}


def read_progress(checkpoint: Path) -> Progress | None:
    """How far the run of a checkpoint had come in its stages; None: it has not begun them."""
    documents = read_checkpoint(checkpoint, stems=[]).documents
    return Progress(**json.loads(documents[PROGRESS])) if PROGRESS in documents else None
