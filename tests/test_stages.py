"""Stages of training that follow each other: no stage evaluates what one before it trained on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import addon_run as run
from addon.items import AddonData
from addon.train_batches import TrainBatches
from engine.records import normalise
from reasoning_gym_wrapper import Reserve, Task
from text_data.trained import TRAINED, trained_by
from tiny_runs import error_lines, newest
from training import Trainer

pytestmark = pytest.mark.usefixtures("no_curve")  # conftest.py
SMALL = '{"max_value": 9}'  # 100 questions
SHAPE = ("--segments", "2")


@pytest.fixture
def seen(monkeypatch) -> dict[str, set[str]]:
    """The questions that runs of this test evaluate and train on from now on; clear them between two stages."""
    found: dict[str, set[str]] = {"trained": set(), "evaluated": set()}
    step = Trainer.step
    evaluate = run.AddonEvaluator.evaluate

    def watched_step(self, batches, number, lr):
        found["trained"].update(normalise(example.question) for batch in batches for example in batch.examples)
        return step(self, batches, number, lr)

    def watched_evaluation(self, number):
        found["evaluated"].update(normalise(example.question) for example in self.data.eval_examples)
        return evaluate(self, number)

    monkeypatch.setattr(Trainer, "step", watched_step)
    monkeypatch.setattr(run.AddonEvaluator, "evaluate", watched_evaluation)
    return found


def first_items(n: int, config: str) -> set[str]:
    return set(Reserve([Task("toy_add", json.loads(config))], n).questions)


def record_in(runs: Path, name: str, goes_on: bool = True):
    return trained_by(newest(runs / name), goes_on)


def test_a_later_stage_evaluates_nothing_that_an_earlier_one_trained_on(call, tmp_path, seen):
    words = ("--task_config", SMALL, *SHAPE)
    assert call("--run_name", "A", *words, "--eval_n", "4", "--max_steps", "12")[0] == 0
    before = set(seen["trained"])
    record = record_in(tmp_path / "runs", "A")
    assert len(record.own) == len(before) > 25 and all(question in record for question in before)
    usual = first_items(40, SMALL)
    assert usual & before, "without the record, these would be evaluated"
    seen["evaluated"].clear()

    status, _, err = call("--resume", str(tmp_path / "runs" / "A"), "--reset_progress", "--run_name", "B", *words,
                          "--eval_n", "40")
    assert status == 0 and "WARNING" not in err
    assert len(seen["evaluated"]) == 40 and not seen["evaluated"] & before
    assert "evaluation questions are left out, since the checkpoint was trained on them" in err

    # The third stage knows of both; so does an evaluation alone.
    third = record_in(tmp_path / "runs", "B", goes_on=False)
    assert all(question in third.earlier for question in seen["trained"])
    seen["evaluated"].clear()
    assert call("--resume", str(tmp_path / "runs" / "B"), "--eval_only", "--eval_n", "10", "--eval_seed",
                "1000000007")[0] == 0
    assert len(seen["evaluated"]) == 10 and not seen["evaluated"] & seen["trained"]


def test_what_a_later_stage_will_evaluate_can_be_set_aside(call, tmp_path, seen):
    words = ("--run_name", "A", *SHAPE, "--max_steps", "12", "--eval_n", "30", "--task_config", '{"max_value": 12}')
    later = first_items(30, SMALL)
    assert call(*words)[0] == 0 and seen["trained"] & later
    seen["trained"].clear()
    status, _, err = call(*words[2:], "--run_name", "kept", "--reserve_tasks", "toy_add", "--reserve_config", SMALL)
    assert status == 0 and "--reserve_tasks toy_add: 30 questions are set aside for a later stage" in err
    assert seen["trained"] and not seen["trained"] & later

    # So that stage evaluates the very items that every other run of its tasks evaluates.
    seen["evaluated"].clear()
    status, _, err = call("--resume", str(tmp_path / "runs" / "kept"), "--reset_progress", "--run_name", "B", *SHAPE,
                          "--reserve_tasks", "none", "--reserve_config", "none", "--eval_n", "30", "--task_config",
                          SMALL)
    assert status == 0 and "left out" not in err and seen["evaluated"] == later


def test_a_stage_that_is_resumed_evaluates_the_same_items(call, tmp_path, seen):
    words = ("--task_config", SMALL, *SHAPE)
    assert call("--run_name", "A", *words, "--max_steps", "12")[0] == 0
    stage = ("--resume", str(tmp_path / "runs" / "A"), "--reset_progress", *words, "--seed", "5",
             "--eval_n", "30")
    assert call(*stage, "--run_name", "whole", "--max_steps", "6")[0] == 0
    assert call(*stage, "--run_name", "cut", "--max_steps", "6", "--save_every", "3", "--checkpoint_limit", "0")[0] == 0
    cut = tmp_path / "runs" / "cut" / "checkpoints" / "step-00000003"
    half = len(trained_by(cut, goes_on=True).own)
    seen["evaluated"].clear()
    assert call("--resume", str(cut), *words, "--eval_n", "30", "--max_steps", "6")[0] == 0
    assert len(seen["evaluated"]) == 30
    texts = [(newest(tmp_path / "runs" / name) / TRAINED).read_bytes() for name in ("whole", "cut")]
    assert texts[0] == texts[1] and 0 < half < len(record_in(tmp_path / "runs", "cut").own)


def test_a_stage_with_too_few_untrained_questions_says_so(call, tmp_path):
    words = ("--task_config", '{"max_value": 3}', *SHAPE)  # 16 questions
    assert call("--run_name", "A", *words, "--eval_n", "2", "--max_steps", "20")[0] == 0
    status, _, err = call("--resume", str(tmp_path / "runs" / "A"), "--reset_progress", "--run_name", "B", *words,
                          "--eval_n", "8")
    (line,) = error_lines("\n".join(line for line in err.splitlines() if "error" in line))
    assert status == 2 and "distinct questions for evaluation beside 14 that the checkpoint was trained on" in line
    assert not (tmp_path / "runs" / "B").exists()


def test_a_checkpoint_without_a_record_is_warned_of(call, tmp_path, monkeypatch):
    """As checkpoints of earlier versions are."""
    monkeypatch.setattr(AddonData, "documents", lambda self: {})
    assert call("--run_name", "A", *SHAPE)[0] == 0
    monkeypatch.undo()
    status, _, err = call("--resume", str(tmp_path / "runs" / "A"), "--reset_progress", "--run_name", "B", *SHAPE,
                          "--eval_n", "5")
    assert status == 0 and "WARNING: training kept off the first 4 evaluation items of each task" in err


@pytest.mark.parametrize(("flags", "told"), [
    (("--reserve_tasks", "toy_ad"), "--reserve_tasks: unknown task 'toy_ad'"),
    (("--reserve_tasks", "toy_add", "--reserve_config", '{"most": 3}'), "--reserve_tasks: task toy_add has no config"),
    (("--reserve_config", "small"), "--reserve_config needs --reserve_tasks"),
])
def test_what_cannot_be_set_aside_is_refused(call, tmp_path, flags, told):
    status, _, err = call(*flags)
    assert status == 2 and told in error_lines(err)[0] and not (tmp_path / "runs").exists()


def test_every_process_records_the_whole_batch(tiny_host):
    """The main process's record is kept, and must know what the others trained on."""
    from addon.streams import training_examples
    from batching import PromptFormat
    from host import load_tokenizer

    task = Task("toy_add")
    ranks = []
    for rank in range(2):
        stream = training_examples([task], Reserve([task], 4), 0, 0)
        ranks.append(TrainBatches(stream, PromptFormat(load_tokenizer(str(tiny_host))), 3, rank=rank, world=2))
    shares = [next(rank).examples for rank in ranks]
    latest = [[example.question for example in rank.latest] for rank in ranks]
    assert latest[0] == latest[1] and len(latest[0]) == 6
    assert {example.question for share in shares for example in share} == set(latest[0])
