"""The loop over GRPO's stages: measure, train, measure, record, save; finished stages are skipped."""

from __future__ import annotations

import csv
import json
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import options
from addon.draws import Draws, drawn_alike
from engine.beginning import check_untouched
from engine.checkpoints import rotate, step_folder, write_checkpoint
from engine.dry_run import NON_FINITE_EXIT
from engine.figures import draw_curve
from engine.files import json_lines, write_text_aside
from engine.logs import RunLog
from engine.machine import Machine
from engine.nonfinite import LeftOut
from engine.optimization import NonFiniteError
from engine.ownership import RECORD
from engine.page import page_of_run
from engine.report import Card, Report, closing_words, stamped
from engine.state import CONFIG
from engine.stopping import Stop, StopRequested, interruptible, leavable
from grpo.measure import Change, Measured, change_table, measure
from grpo.problems import Problem, tasks_of, training_problems
from grpo.progress import PROGRESS, GrpoProgress, Metrics, conditions_of
from grpo.stage_folder import as_begun, forget, newest_state, open_folder, read_own, step_of_state
from grpo.stages import HeldOut, Stage, rewards_of
from grpo.trained import TrainedModel
from reasoning_gym_wrapper import train_seed

STAGES = "stages"  # folder in the run, with the state of the stage at hand
SAMPLES = "samples"  # folder in the run, with completions of every finished stage
SEED_OF_STAGE = 7  # each stage draws its questions from a seed of its own, none of which is the warm start's


@dataclass(frozen=True)
class StageLoopConfig:
    """What the loop over the stages needs of the flags.

    Args:
        settings: text of config.resolved.yaml, which alone reruns the run.
        flags: every flag by name, for trackers.
        seed: seed of the questions that are trained on.
        on_nonfinite: stop or skip, what happens to a step whose gradient is no number.
        eval_batch_size: completions generated at a time.
        checkpoint_limit: newest checkpoints to keep; 0 = all.
        trackers: comma list of where else to log; "" = nowhere.
        log_csv: the evaluation table; None = eval.csv in the run's folder.
        report: write report.html at the end.
        resume, run_name: what the call goes on from, as typed.
    """

    settings: str
    flags: Mapping[str, Any]
    seed: int = 0
    on_nonfinite: str = "stop"
    eval_batch_size: int = 128
    checkpoint_limit: int = 3
    trackers: str = ""
    log_csv: str | None = None
    report: bool = True
    resume: str | None = None
    run_name: str | None = None


class StageLoop:
    """Runs the stages in order on a trained model.

    Args:
        trained: the model and the run it comes from.
        config: the loop's flags.
        stages: what to run.
        held_out: the questions of each stage that are measured, and all that no stage may train on.
        progress: how far the run has come; it moves with the loop.
    """

    def __init__(
        self,
        trained: TrainedModel,
        config: StageLoopConfig,
        stages: Sequence[Stage],
        held_out: HeldOut,
        progress: GrpoProgress,
    ):
        self.trained = trained
        self.machine = trained.machine
        self.config = config
        self.stages = stages
        self.held_out = held_out
        self.progress = progress
        self.checkpoint = trained.checkpoint  # the newest
        self.log: RunLog | None = None
        self.left_out = LeftOut(config.on_nonfinite)  # of all stages
        self.left_out.restore({"count": progress.left_out})

    def run(self) -> int:
        """Runs what is left. Returns 0, or the exit status of an early but orderly end."""
        config = self.config
        csv_path = None
        if config.log_csv:
            csv_path = Path(config.log_csv)
        trackers = options.names(config.trackers)
        with RunLog(
            self.trained.folder, csv_path, trackers, dict(config.flags), self.machine.is_main, self.progress.elapsed_s
        ) as self.log:
            if self.machine.is_main:
                check_untouched(self.trained.folder, self.checkpoint, config.resume, config.run_name)
            with interruptible() as stop:
                for index, stage in enumerate(self.stages):
                    if stage.name in self.progress.done:
                        if self.machine.is_main:  # where a kill came before it was done
                            forget(self.trained.folder / STAGES / stage.name)
                        self.machine.say(f"stage {stage.name} is finished, skipped")
                        continue
                    if self.machine.any_process(stop.signal is not None):
                        return self._stopped(f"before stage {stage.name}", stop)
                    try:
                        status = self.run_stage(stage, index, stop)
                    except StopRequested:
                        return self._stopped(f"while stage {stage.name} was measured", stop)
                    if status:
                        return status

            self._close()
        return 0

    def record(self, report: Report) -> None:
        """Writes rows and predictions at the step of now."""
        step = self.progress.step
        rows = stamped(report.rows, step, self.log.elapsed_s)
        self.log.evaluation(step, rows, stamped(report.predictions, step), report.tokens)

    # --- one stage ---

    def run_stage(self, stage: Stage, index: int, stop: Stop) -> int:
        """Runs one stage, the run's number `index`, to its end. Returns 0 or the exit status, as `run`."""
        from grpo.stage_trainer import StageRun  # 7 s, only where it is needed

        base = self.progress.step
        place = self.trained.folder / STAGES / stage.name

        # All of a stage follows from the flags and its number, so an interrupted one goes on with the same questions.
        functions, weights = rewards_of(stage, self.trained.has_tags, self.trained.prompt_format.answer_from)
        seed = train_seed(self.config.seed + SEED_OF_STAGE + index)
        open_folder(place, base, self.machine)
        problems = stage_problems(stage, seed, self.held_out.reserved, place / "draws.json", self.machine)
        # Where an interrupted call stopped; what it recorded after that is recorded again.
        state = newest_state(place, self.machine.say)
        steps = step_of_state(state) if state else 0
        stage = as_begun(stage, place, self.machine, goes_on=state is not None)
        self.log.truncate_after(base + steps, evaluate=steps > 0)
        before = self._start_of(stage, functions, place)

        going_on = f", going on from {state.name}" if state else ""
        self.machine.say(f"stage {stage.name}: {len(problems)} questions x {stage.epochs:g} epochs{going_on}")

        run = StageRun(
            stage,
            place,
            functions,
            weights,
            log=lambda step, numbers: self._log(stage.name, base + step, numbers),
            stopped=lambda: self.machine.any_process(stop.signal is not None),
            precision=self.machine.precision,
            device=self.machine.device.type,
            left_out=self.left_out,
        )
        status, steps = self._train(problems, run, stop)
        if status:
            return status

        for problem in problems:
            self.trained.trained.add(problem.question)

        # The checkpoint comes last: a crash before it runs the end of the stage again.
        self.progress.step = base + steps
        self.progress.left_out = self.left_out.count
        after = self._measure(stage, functions)
        self._record_end(stage, after, before)
        self._save(after)
        if self.machine.is_main:
            forget(place)
            print(f"after {after.line(before)}", flush=True)
        return 0

    def _start_of(self, stage: Stage, functions: Sequence[Any], place: Path) -> Metrics:
        """The stage's held-out metrics before its first step; measured once, and kept in the stage's folder.

        The weights of now are those before the first step, of an interrupted stage as well: with other questions or
        rewards than the record's, they are measured anew.
        """
        if stage.name in self.progress.start:
            return self.progress.start[stage.name]

        # Measuring takes as long as many steps, so an interrupted stage does not do it again.
        path = place / "start.json"
        record = self.machine.of_main(lambda: read_own(path))  # all measure, or none
        conditions = conditions_of(stage, self.held_out)
        if not isinstance(record, dict) or record.get("asked") != conditions:
            start = self._measure(stage, functions)
            if self.machine.is_main:
                record_start(self.log, self.progress.step, start)
            record = {"asked": conditions, "metrics": start.means()}
            if self.machine.is_main:
                write_text_aside(path, json.dumps(record))
            self.machine.say(f"before {start.line()}")

        self.progress.start[stage.name] = record["metrics"]
        self.progress.conditions[stage.name] = conditions
        return record["metrics"]

    def _train(self, problems: Sequence[Any], run: Any, stop: Stop) -> tuple[int, int]:
        """Trains the stage. Returns (0 or the exit status, the stage's optimizer steps so far)."""
        from grpo.stage_trainer import train_stage

        name = run.stage.name
        try:
            is_finished, steps = train_stage(self.trained.model, self.trained.prompt_format, problems, run)
        except NonFiniteError as error:
            self.machine.say(f"{options.PROG}: {error}: stopped before the step; the newest state is in {run.folder}")
            return NON_FINITE_EXIT, 0
        if is_finished:
            return 0, steps

        # TRL has saved the state that the same command goes on from.
        return self._stopped(f"in stage {name} at its step {steps}", stop), steps

    def _stopped(self, where: str, stop: Stop) -> int:
        """Tells how to go on; returns the exit status."""
        self.machine.say(f"stopped {where}, saved; go on with: {self.trained.resume}")
        return 128 + (stop.signal or signal.SIGTERM)

    def _log(self, stage: str, step: int, numbers: dict[str, float]) -> None:
        """Logs a step's metrics, and says the most telling of them."""
        self.log.log(step, stage=stage, **numbers)
        self.machine.say(step_line(stage, step, numbers))

    def _measure(self, stage: Stage, functions: Sequence[Any]) -> Measured:
        """The stage's held-out questions answered and judged. Raises StopRequested between two batches of them."""
        with leavable(self.machine.world == 1):
            return measure(
                self.trained.model,
                self.trained.prompt_format,
                stage.name,
                self.held_out.problems[stage.name],
                functions,
                stage.config.max_completion_length,
                self.trained.has_tags,
                self.config.eval_batch_size,
                self.trained.trainer.autocast(),
                self.machine,
            )

    # --- what a stage leaves behind ---

    def _record_end(self, stage: Stage, after: Measured, before: Metrics) -> None:
        """CSV, predictions and sample completions of a finished stage."""
        self.progress.done[stage.name] = after.means()
        self.record(after.report(before))

        # For people to read; the CSV holds what they add up to.
        if self.machine.is_main:
            folder = self.trained.folder / SAMPLES
            folder.mkdir(exist_ok=True)
            lines = [json.dumps(sample, ensure_ascii=False) for sample in after.samples()]
            write_text_aside(folder / f"{stage.name}.jsonl", "\n".join(lines) + "\n")

    def _save(self, after: Measured) -> None:
        """The checkpoint at the end of a stage."""
        if not self.machine.is_main:
            return

        config = self.trained.model.config
        if hasattr(config, "adaptive_cycles"):
            config.adaptive_cycles = False  # GRPO moves the states that the gate had learnt to judge

        self.progress.elapsed_s = self.log.elapsed_s
        trainer = self.trained.trainer

        documents = {
            PROGRESS: self.progress.document(),
            CONFIG: self.config.settings,
            RECORD: self.log.claim.document(),
            "README.md": self._card(after),
            **trainer.documents(),
            **self.trained.trained.documents(),
        }

        place = step_folder(self.trained.folder, self.progress.step)
        self.checkpoint = write_checkpoint(place, {trainer.stem: trainer.weights()}, documents)
        write_text_aside(self.trained.folder / CONFIG, self.config.settings)
        rotate(self.trained.folder, self.config.checkpoint_limit, keep=[self.checkpoint])

    def _card(self, after: Measured) -> str:
        """README.md of the checkpoint at the end of a stage."""
        stages = ", ".join(self.progress.done)
        card = Card(self.trained.library, ["hrm", "grpo"], self.trained.title, f"; GRPO stages done: {stages}.")
        return card.text(self.progress.step, after.line(self.progress.start.get(after.stage)))

    def _close(self) -> None:
        """The closing words: start and end of each stage, files, next command."""
        if not self.machine.is_main:
            return

        print(self.left_out.closing(), end="")
        print(change_table(changes_of(self.progress, self.stages, self.held_out)))

        curve = draw_curve(self.trained.folder, self.log.csv_path, self.log.run)
        question = self.held_out.problems[self.stages[-1].name][0].question
        samples = self.trained.folder / SAMPLES
        page = page_of_run(self.trained.folder, self.log.csv_path) if self.config.report else None
        print(closing_words(self.log.csv_path, self.checkpoint, curve, question, samples=samples, page=page))


def record_start(log: RunLog, step: int, start: Measured) -> None:
    """Writes down what of a stage's start is not recorded yet, by the warm start or a call that was killed."""
    report = start.report()
    is_recorded = has_rows(log, step, start.stage)
    rows = [] if is_recorded else report.rows
    lines = [] if is_recorded and has_lines(log, step, start.stage) else report.predictions
    if rows or lines:
        log.evaluation(step, stamped(rows, step, log.elapsed_s), stamped(lines, step))


def has_rows(log: RunLog, step: int, stage: str) -> bool:
    """Whether the CSV holds the stage's figures of this step: the warm start ends with those of every stage."""
    if not log.csv_path.exists():
        return False

    place = (str(step), stage, log.run)
    with open(log.csv_path, newline="", encoding="utf-8") as file:
        return any((row["step"], row["task"], row["run"]) == place for row in csv.DictReader(file))


def has_lines(log: RunLog, step: int, stage: str) -> bool:
    """Whether the predictions of that evaluation are recorded, too, which are written after its rows."""
    lines = (line for _, line in json_lines(log.predictions_path, skip_damaged=True))
    return any((line.get("step"), line.get("task")) == (step, stage) for line in lines)


def stage_problems(
    stage: Stage, seed: int, reserved: set[str], record: Path, machine: Machine
) -> list[Problem]:
    """What a stage trains on, alike in all processes.

    The items that took too long to make are kept in `record`, and stay passed over.

    Raises:
        ValueError: as `training_problems`.
    """
    known = machine.of_main(lambda: read_own(record)) or {}
    draws = Draws.of(known, repeats=False)
    problems = drawn_alike(
        lambda: training_problems(stage.levels, stage.size, seed, reserved), tasks_of(stage.levels), machine, draws
    )
    if machine.is_main and draws.document() != known:
        write_text_aside(record, json.dumps(draws.document()))
    return problems


def step_line(stage: str, step: int, numbers: Mapping[str, float]) -> str:
    """The most telling metrics of an optimizer step, for people; metrics that are not there are left out."""
    words = [f"stage {stage} step {step}"]
    for name in ("reward", "frac_reward_zero_std", "entropy"):
        if name in numbers:
            words.append(f"{name} {numbers[name]:.3f}")

    words.append(f"{numbers.get('mean_length', 0):.0f} tokens")
    words.append(f"{numbers.get('step_time', 0):.1f} s a step")
    return "  ".join(words)


def changes_of(progress: GrpoProgress, stages: Sequence[Stage], held_out: HeldOut) -> list[Change]:
    """What each finished stage did, those of earlier calls too: the record holds their metrics."""
    changes = []
    for stage in stages:
        if stage.name not in progress.start:
            continue
        conditions = progress.conditions.get(stage.name) or conditions_of(stage, held_out)
        start = progress.start[stage.name]
        end = progress.done[stage.name]
        changes.append(Change(stage.name, conditions["rewards"], conditions["n"], start, end))
    return changes
