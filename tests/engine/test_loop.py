"""loop: a system plugs in by objects alone; what each is asked, in which order, and what a checkpoint brings back."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import options
from engine.batches import by_length
from engine.limits import Limits, limits_of
from engine.loop import RunLoop
from engine.machine import machine_problems, start_machine
from engine.optimization import BaseTrainer, NonFiniteError, OptimConfig
from engine.ownership import RECORD, known_id, taken
from engine.report import Card, Report, metric_row, prediction_line
from engine.system import Evaluator, Facts, Hooks, LoopConfig

OPTS = options.parse(["--device", "cpu", "--mixed_precision", "none"])


class Numbers:
    """Training batches that are the numbers 0, 1, 2, ..."""

    size = 10

    def __init__(self):
        self.next = 0

    def next_batches(self) -> list[int]:
        self.next += 1
        return [self.next - 1]

    def state(self) -> dict[str, Any]:
        return {"next": self.next}

    def load_state(self, state: dict[str, Any]) -> None:
        self.next = state["next"]

    def documents(self) -> dict[str, str]:
        return {}

    def describe(self, batches: list[int]) -> list[dict[str, Any]]:
        return [{"number": batch} for batch in batches]


class Adder(BaseTrainer):
    """Its one weight is the sum of the batches it has seen."""

    def __init__(self, machine):
        model = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        parameters = dict(model.named_parameters())
        optimizers = [(torch.optim.SGD(model.parameters(), lr=1.0), list(parameters))]
        super().__init__(
            OptimConfig(ema=0.0), model, model, machine.accelerator, machine.precision, parameters, optimizers
        )
        self.steps: list[int] = []

    def weights(self):
        return dict(self.model.state_dict())

    def documents(self):
        return {"config.json": "{}"}

    def load(self, saved, folder):
        self.model.load_state_dict(saved.tensors[self.stem])

    def step(self, batches, step, lr):
        self.steps.append(step)
        with torch.no_grad():
            self.model.weight += sum(batches)
        return {"loss": 1.0, "grad_norm": 0.0, "lr": lr, "segments": 1, "examples": 1, "tokens_read": 5}

    plain = step


class SumEvaluator(Evaluator):
    """Measures the sum."""

    def __init__(self, trainer: Adder, untrained: bool = False):
        self.trainer = trainer
        self.untrained = untrained

    def evaluate(self, step: int) -> Report:
        value = float(self.trainer.model.weight.detach())
        return Report(
            [metric_row("numbers", "sum", value, 1)],
            [prediction_line("numbers", 0, "sum?", str(value), value)],
            f"the sum is {value:.0f}",
            value,
            notes="one note",
            question="sum?",
        )

    def samples(self, turn: int) -> list[str]:
        return [f"sample of turn {turn}"]

    def before_training(self) -> Report | None:
        return self.evaluate(0) if self.untrained else None


class Told(Hooks):
    """Remembers what it was asked; ends training early or refuses to go on where it is told to."""

    def __init__(self, end_after: int | None = None, done: str | None = None):
        super().__init__()
        self.end_after = end_after
        self.done = done
        self.calls: list[tuple] = []

    def alarms(self, step, metrics):
        self.calls.append(("alarms", step))
        return ["two!"] if step == 2 else []

    def shown(self, metrics):
        return {"extra": "shown"}

    def after_evaluation(self, step, report, share):
        self.calls.append(("after_evaluation", step, share))
        self.extra["seen"] = step

    def ended_early(self):
        alarms = [call for call in self.calls if call[0] == "alarms"]
        return "enough" if self.end_after is not None and len(alarms) >= self.end_after else None

    def nothing_to_do(self, step, total_steps, share, early):
        return self.done

    def restored(self, before):
        self.calls.append(("restored", dict(self.extra)))
        return ["a note of the hooks"]


@pytest.fixture
def build(tmp_path, monkeypatch):
    """Builds a loop in `tmp_path/run`, going on from the newest checkpoint where there is one."""
    monkeypatch.setattr("engine.loop.draw_curve", lambda *arguments: None)

    def build_here(hooks: Hooks | None = None, untrained: bool = False, facts: dict | None = None, **flags) -> RunLoop:
        given = {"max_steps": 4, "eval_every": 2, "save_every": 1, "log_steps": 1, "checkpoint_limit": 0,
                 "save_dir": str(tmp_path), "run_name": "run", "report": False, **flags}
        opts = options.replace(OPTS, **given)
        config = options.part(LoopConfig, opts, settings=options.rerun_text(opts), flags=options.as_dict(opts))
        machine = start_machine(config)
        trainer = Adder(machine)
        card = Card("none", ["test"], "An adder", ".")
        described = Facts("numbers", "an adder", card, **(facts or {}))
        found = sorted((tmp_path / given["run_name"] / "checkpoints").glob("step-*"))
        checkpoint = found[-1] if found else None
        evaluator = SumEvaluator(trainer, untrained)
        return RunLoop(config, machine, Numbers(), trainer, evaluator, described, hooks or Hooks(), checkpoint)

    return build_here


def rows_of(run: Path) -> list[list[str]]:
    return [line.split(",") for line in (run / "eval.csv").read_text(encoding="utf-8").splitlines()[1:]]


def test_patience_ends_training_and_outlives_a_resume(build, monkeypatch, tmp_path, capsys):
    rates = {1: 0.1, 2: 0.3, 3: 0.3, 4: 0.2, 5: 0.3, 6: 0.9, 7: 0.9}
    plain = SumEvaluator.evaluate
    monkeypatch.setattr(SumEvaluator, "evaluate", lambda self, step: replace(plain(self, step), solved=rates[step]))
    flags = {"max_steps": 7, "eval_every": 1, "patience": 3}
    with monkeypatch.context() as patch:  # killed between the second and the third that count
        patch.setattr(Adder, "step", lambda self, *rest: 1 / 0 if rest[1] == 4 else Adder.plain(self, *rest))
        with pytest.raises(ZeroDivisionError):
            build(**flags).go()
    loop = build(**flags)
    assert loop.go() == 0 and loop.step == 5 and loop.finished
    said = "training ended at step 5: the solved rate was no better than the best before 3 times in a row"
    assert f"{said} (--patience 3)" in capsys.readouterr().err
    again = build(**flags)
    assert again.go() == 0 and again.trainer.steps == []
    more = build(**flags | {"patience": 4})
    assert more.go() == 0 and more.step == 7, "a new best at step 6 begins the count anew"


def spoilt_at(*bad: int):
    """A step of `Adder` that finds no number in these batches."""

    def step(self, batches, step, lr):
        if step in bad:
            raise NonFiniteError(f"batch {step}: loss nan, gradient norm nan", float("nan"), float("nan"))
        return Adder.plain(self, batches, step, lr)

    return step


def test_batches_without_a_number_are_left_out_and_counted_across_a_resume(build, monkeypatch, tmp_path, capsys):
    with monkeypatch.context() as patch:  # killed behind the first of two
        patch.setattr(Adder, "step", lambda self, *rest: 1 / 0 if rest[1] == 2 else spoilt_at(1)(self, *rest))
        with pytest.raises(ZeroDivisionError):
            build(on_nonfinite="skip").go()
    monkeypatch.setattr(Adder, "step", spoilt_at(2))
    loop = build(on_nonfinite="skip")
    assert loop.left_out.count == loop.left_out.row == 1
    assert loop.go() == 0 and loop.step == 4 and float(loop.trainer.model.weight) == 0 + 3
    text = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8")
    lines = [json.loads(line) for line in text.splitlines()]
    assert [line["batches_left_out"] for line in lines] == [0, 1, 2, 2]
    assert "2 batches were left out" in capsys.readouterr().out


def test_the_tenth_batch_in_a_row_without_a_number_ends_the_run(build, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(Adder, "step", spoilt_at(*range(1, 20)))
    loop = build(on_nonfinite="skip", max_steps=30)
    assert loop.go() == 3 and loop.step == 10 and loop.left_out.count == 9
    assert "the 10th batch in a row without a number" in capsys.readouterr().err
    assert (tmp_path / "run" / "bad_batch.json").exists()


def test_every_part_is_asked_in_its_turn(build, capsys, tmp_path):
    hooks = Told()
    loop = build(hooks, log_samples_every=2)
    assert loop.go() == 0 and loop.finished
    assert loop.trainer.steps == [0, 1, 2, 3] and loop.report.value == 0 + 1 + 2 + 3
    assert hooks.calls == [("alarms", 1), ("alarms", 2), ("after_evaluation", 2, 0.5), ("alarms", 3), ("alarms", 4),
                           ("after_evaluation", 4, 1.0)]
    out, err = capsys.readouterr()
    assert err.startswith("an adder; 4 steps of 64 examples\n")
    assert "WARNING: step 2: two!" in err and "[step 4] sample of turn 2" in err and "extra shown" in err
    assert "step 2\nthe sum is 1\n" in err
    assert out.startswith("the sum is 6\none note\nevaluation: ") and out.rstrip().endswith("--compare --prompt 'sum?'")
    assert [row[:4] for row in rows_of(tmp_path / "run")] == [
        ["2", "numbers", "sum", "1"], ["4", "numbers", "sum", "6"]]
    predictions = (tmp_path / "run" / "predictions.jsonl").read_text(encoding="utf-8")
    (first, second) = (json.loads(line) for line in predictions.splitlines())
    assert (first["step"], second["step"], second["id"]) == (2, 4, "numbers/00000")
    card = (tmp_path / "run" / "checkpoints" / "step-00000004" / "README.md").read_text(encoding="utf-8")
    assert card == ("---\nlibrary_name: none\ntags: [test]\n---\n\n# An adder\n\nStep 4.\n\n```\nthe sum is 6\n```\n")


def test_an_evaluation_outside_training_has_no_share(build):
    hooks = Told()
    assert build(hooks, eval_every=0).go() == 0
    assert [call for call in hooks.calls if call[0] == "after_evaluation"] == [("after_evaluation", 4, None)]


def test_what_changes_comes_back_from_a_checkpoint(build, capsys):
    assert build(Told(end_after=3)).go() == 0
    assert "training ended at step 3: enough" in capsys.readouterr().err
    hooks = Told()
    loop = build(hooks)
    assert hooks.calls == [("restored", {"seen": 3})] and (loop.step, loop.data.next) == (3, 3)
    assert "a note of the hooks" in capsys.readouterr().err
    assert loop.go() == 0 and loop.trainer.steps == [3] and loop.report.value == 6
    assert ", from step 3" in capsys.readouterr().err


def test_a_run_with_nothing_left_to_do_is_not_touched(build, capsys, tmp_path):
    loop = build(Told(done="is done"))
    assert loop.go() == 0 and not loop.finished and not (tmp_path / "run").exists()
    assert f"{tmp_path / 'run'} is done" in capsys.readouterr().err
    assert build(Told(done="")).go() == 0
    assert capsys.readouterr().err == "an adder; 4 steps of 64 examples\n"


def test_the_random_weights_are_recorded_where_a_system_wants_it(build, tmp_path, capsys):
    assert build(untrained=True).go() == 0
    assert [row[0] for row in rows_of(tmp_path / "run")] == ["0", "2", "4"]
    assert "the sum is 0" in capsys.readouterr().err


def test_a_stage_that_another_follows_names_it_and_no_files(build, capsys):
    assert build(facts={"next_stage": "done after {step} steps"}).go() == 0
    assert capsys.readouterr().out == "the sum is 6\none note\ndone after 4 steps\n"


def test_a_run_of_no_checkpoint_reports_and_saves_nothing_with_dry_run(build, tmp_path, capsys):
    loop = build(dry_run=True, facts={"dry_run_step": 7, "parts": {"adder": torch.nn.Linear(2, 2)}})
    assert loop.go() == 0 and not loop.finished and not (tmp_path / "run").exists()
    assert loop.trainer.steps == [7, 8, 9]
    assert "adder" in capsys.readouterr().err


def test_limits_end_a_run_at_whichever_comes_first():
    config = options.part(LoopConfig, OPTS, settings="", flags={})
    machine = start_machine(config)
    assert limits_of(replace(config, max_steps=0, epochs=3, batch_size=4), Numbers(), machine).total_steps == 8
    assert limits_of(replace(config, max_steps=5, epochs=3, batch_size=4), Numbers(), machine).total_steps == 5
    limits = Limits(10, 1.0, machine)
    assert limits.share(5, 0.0) == 0.5 and limits.share(1, 45.0) == 0.75 and limits.share(11, 90.0) == 1.0
    assert limits.warmup(3) == 3 and limits.warmup(50) == 5 and Limits(None, 1.0, machine).warmup(50) == 50
    assert limits.words() == "10 steps" and Limits(None, 1.0, machine).words() == "1.0 minutes"


# --- the learning rate


def rates_of(run: Path) -> list[float]:
    return [json.loads(line)["lr"] for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def test_a_long_warmup_ends_at_the_peak_and_the_rate_falls_from_there(build, tmp_path):
    build(max_steps=8, warmup_steps=50, lr=1.0, lr_scheduler="linear").go()  # cut to 4
    assert rates_of(tmp_path / "run") == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0, 0.75, 0.5, 0.25])


@pytest.mark.parametrize("fall", ["after_warmup", "whole_run"])
def test_a_resumed_run_has_the_rates_of_an_uninterrupted_one(build, tmp_path, fall):
    flags = {"max_steps": 8, "warmup_steps": 3, "lr": 1.0, "lr_fall": fall}
    build(**flags).go()
    whole = rates_of(tmp_path / "run")
    for folder in sorted((tmp_path / "run" / "checkpoints").iterdir())[5:]:
        shutil.rmtree(folder)
    build(**flags).go()
    assert rates_of(tmp_path / "run") == whole and len(whole) == 8


def test_a_run_that_is_limited_by_time_remembers_when_its_warmup_ended(build, tmp_path, monkeypatch):
    clock = iter(range(10**6))
    monkeypatch.setattr("engine.logs.time.monotonic", lambda: float(next(clock)))
    flags = {"max_steps": 0, "max_minutes": 2.0, "warmup_steps": 3, "lr": 1.0, "lr_scheduler": "linear",
             "eval_every": 0}
    build(**flags).go()
    rates = rates_of(tmp_path / "run")
    assert rates[2] == 1.0 and rates[3] > 0.97 and rates[3:] == sorted(rates[3:], reverse=True) and rates[-1] < 0.15

    folders = sorted((tmp_path / "run" / "checkpoints").iterdir())
    for folder in folders[len(folders) // 2 :]:
        shutil.rmtree(folder)
    loop = build(**flags)
    warmup_s = loop.warmup.seconds
    assert 0 < warmup_s < 60
    loop.go()
    assert loop.warmup.seconds == warmup_s


# --- records of runs that share a table, or begin again


def steps_in(path: Path) -> list[tuple[str, str]]:
    with open(path, newline="", encoding="utf-8") as file:
        return [(row["run"].rpartition("-")[0], row["step"]) for row in csv.DictReader(file)]


def test_two_runs_with_one_table_each_keep_their_rows_when_either_goes_on(build, tmp_path):
    """Each is cut after step 2, then goes on, in both orders."""
    table = tmp_path / "all.csv"
    flags = {"log_csv": str(table), "max_steps": 4, "eval_every": 1}
    for name in ("one", "two"):
        build(run_name=name, **flags).go()
    for name in ("one", "two", "one"):
        for folder in sorted((tmp_path / name / "checkpoints").iterdir())[2:]:
            shutil.rmtree(folder)
        build(run_name=name, **flags).go()
    expected = [(name, str(step)) for name in ("one", "two") for step in range(1, 5)]
    assert sorted(steps_in(table)) == expected
    assert not (tmp_path / "one" / "eval.csv").exists()


def test_a_run_that_died_before_its_first_checkpoint_records_nothing_twice(build, tmp_path):
    flags = {"max_steps": 4, "eval_every": 1, "save_every": 0, "untrained": True}
    died = build(**flags)
    died.trainer.step = dies_after(died.trainer.step, 3)
    with pytest.raises(KeyError):
        died.go()
    assert len(steps_in(tmp_path / "run" / "eval.csv")) == 3
    build(**flags).go()
    assert [step for _, step in steps_in(tmp_path / "run" / "eval.csv")] == ["0", "1", "2", "3", "4"]
    assert len(rates_of(tmp_path / "run")) == 4


def test_a_run_that_ended_early_and_died_while_it_closed_evaluates_once(build, tmp_path):
    flags = {"max_steps": 9, "eval_every": 2}
    build(Told(end_after=2), **flags).go()
    assert [step for _, step in steps_in(tmp_path / "run" / "eval.csv")] == ["2"]
    build(Told(end_after=0), **flags).go()
    assert [step for _, step in steps_in(tmp_path / "run" / "eval.csv")] == ["2"]


def signals_at(function, calls: int):
    """`function`, which at its call number `calls` is told to stop amid work of several batches."""
    counted = iter(range(1, 10**6))

    def signalled(*arguments):
        if next(counted) == calls:
            signal.raise_signal(signal.SIGTERM)
            by_length([1, 2], [1, 1], 1, list)
        return function(*arguments)

    return signalled


def test_a_signal_amid_an_evaluation_ends_it_and_the_run_that_goes_on_makes_up_for_it(build, capsys, tmp_path):
    hooks = Told()
    build(run_name="whole").go()
    loop = build(hooks)
    loop.evaluator.evaluate = signals_at(loop.evaluator.evaluate, 1)
    assert loop.go() == 143 and loop.trainer.steps == [0, 1] and not rows_of(tmp_path / "run")
    assert "stopped at step 2, saved" in capsys.readouterr().err
    assert hooks.calls == [("alarms", 1), ("alarms", 2)]

    # Told again before it is done, it still owes it.
    loop = build()
    loop.evaluator.evaluate = signals_at(loop.evaluator.evaluate, 1)
    assert loop.go() == 143 and loop.trainer.steps == []
    hooks = Told()
    loop = build(hooks)
    assert loop.go() == 0 and loop.trainer.steps == [2, 3]
    assert hooks.calls[1:3] == [("after_evaluation", 2, 0.5), ("alarms", 3)]
    assert [row[:4] for row in rows_of(tmp_path / "run")] == [row[:4] for row in rows_of(tmp_path / "whole")]


def test_a_signal_at_the_end_of_an_owed_evaluation_ends_the_run_after_it(build, capsys, tmp_path):
    loop = build()
    loop.evaluator.evaluate = signals_at(loop.evaluator.evaluate, 1)
    assert loop.go() == 143
    loop = build()
    evaluate = loop.evaluator.evaluate

    def signalled(step):
        signal.raise_signal(signal.SIGTERM)
        return evaluate(step)

    loop.evaluator.evaluate = signalled
    capsys.readouterr()
    assert loop.go() == 143 and loop.trainer.steps == [] and "stopped at step 2, saved" in capsys.readouterr().err
    assert rows_of(tmp_path / "run")


def test_a_signal_amid_the_drawing_of_a_batch_ends_it_at_the_position_before(build, capsys, tmp_path):
    loop = build(save_every=0)
    draw = loop.data.next_batches
    loop.data.next_batches = lambda: [*draw(), *signals_at(list, 1 if loop.step == 2 else 0)()]
    assert loop.go() == 143 and "stopped at step 2, saved" in capsys.readouterr().err
    loop = build()
    assert (loop.step, loop.data.next) == (2, 2)
    assert loop.go() == 0 and loop.report.value == 6


def test_a_signal_amid_the_first_draw_has_nothing_to_save(build, capsys, tmp_path):
    loop = build()
    loop.data.next_batches = signals_at(loop.data.next_batches, 1)
    assert loop.go() == 143
    assert "stopped before the first step" in capsys.readouterr().err and not (tmp_path / "run/checkpoints").exists()


def test_work_amid_a_step_is_not_left(build):
    loop = build()
    loop.trainer.step = signals_at(loop.trainer.step, 1)
    assert loop.go() == 143 and loop.step == 1


def dies_after(function, calls: int):
    """`function`, which raises at its call number `calls`."""
    counted = iter(range(1, 10**6))

    def dying(*arguments, **named):
        if next(counted) == calls:
            raise KeyError("killed")
        return function(*arguments, **named)

    return dying


def test_a_second_process_in_the_same_folder_is_refused_before_it_writes(build, tmp_path):
    first = build(max_steps=1)
    first.go()
    first.log._open(alone=True)
    second = build(max_steps=2)
    with pytest.raises(ValueError, match="being written by another process"):
        second.go()
    assert machine_problems(second.config, second.checkpoint) == [taken(tmp_path / "run")]
    first.log.close()
    assert machine_problems(second.config, second.checkpoint) == [] and second.go() == 0


def test_an_evaluation_beside_the_training_adds_its_rows(build, tmp_path):
    first = build(max_steps=1)
    first.go()
    first.log._open(alone=True)
    beside = build(max_steps=1, eval_only=True)
    assert machine_problems(beside.config, beside.checkpoint) == [] and beside.go() == 0
    assert steps_in(tmp_path / "run" / "eval.csv") == [("run", "1"), ("run", "1")]
    first.log.close()


def test_the_id_of_a_run_is_in_its_checkpoints(build, tmp_path):
    build(max_steps=1).go()
    saved = tmp_path / "run" / "checkpoints" / "step-00000001" / RECORD
    assert json.loads(saved.read_text(encoding="utf-8")) == {"run": known_id(tmp_path / "run")}
