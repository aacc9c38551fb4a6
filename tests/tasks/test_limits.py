"""tasks/limits.py in use: a scorer or a generator that takes too long is ended, counted and told."""

from __future__ import annotations

import itertools
import time

import pytest

import options
import reasoning_gym_wrapper as rg
from evaluation import Evaluation
from patience import HANG_S
from reasoning_gym_wrapper import Reserve, Task, TaskError, Verdict
from tasks.limits import JudgeConfig
from tasks.toy_add import ToyAddConfig, ToyAddDataset
from test_evaluation import given_answer

SHORT = JudgeConfig(0.2, 0.2)


class Slow(ToyAddDataset):
    """Sums whose scorer never ends on `slow`, and evaluates `exit()`; every fourth item never comes, or none does."""

    never = False

    def __getitem__(self, index):
        if self.never or (self.seed + index) % 4 == 2:
            time.sleep(HANG_S)
        return super().__getitem__(index)

    def score_answer(self, answer, entry):
        try:
            while answer == "slow":
                pass
        except:  # noqa: E722 - as foreign scorers do
            return 1.0
        if answer == "exit()":
            raise SystemExit
        return super().score_answer(answer, entry)


class Never(Slow):
    never = True


@pytest.fixture(autouse=True)
def slow_tasks(monkeypatch):
    """`slow_add` and `never_add` are tasks like any other."""
    more = {"slow_add": (Slow, ToyAddConfig), "never_add": (Never, ToyAddConfig)}
    whole = {**rg.registry(), **more}
    monkeypatch.setattr(rg, "registry", lambda: whole)


def test_an_answer_whose_scoring_takes_too_long_is_wrong():
    example = next(Task("slow_add", limits=SHORT).items(0))[1]
    assert example.verify("slow") == Verdict(0.0, timed_out=True)
    assert not example.verify("slow").solved
    assert example.verify(example.target) == Verdict(1.0)


def test_an_answer_that_ends_python_is_wrong():
    example = next(Task("slow_add").items(0))[1]
    assert example.verify("exit()") == Verdict(0.0, raised=True)


def test_an_item_that_takes_too_long_is_passed_over_and_told(capsys):
    task = Task("slow_add", limits=SHORT)
    items = list(itertools.islice(task.items(0), 6))
    assert [index for index, _ in items] == [0, 1, 3, 4, 5, 7]
    assert task.passed_over == {0: [2, 6]}
    told = capsys.readouterr().err.splitlines()
    assert told == ["WARNING: task slow_add: an item took longer than --draw_timeout_s 0.2 to make and is passed "
                    "over"] * 2


def test_what_was_passed_over_stays_so_on_a_faster_machine():
    task = Task("slow_add", limits=JudgeConfig(HANG_S, HANG_S))
    task.passed_over = {0: [1, 2]}
    assert [index for index, _ in itertools.islice(task.items(0), 2)] == [0, 3]
    assert task.passed_over == {0: [1, 2]}


def test_a_task_that_makes_nothing_in_time_is_refused_in_one_line():
    with pytest.raises(TaskError) as caught:
        Reserve([Task("never_add", limits=SHORT)], 4)
    assert str(caught.value) == (
        "task never_add: 3 items in a row took longer than --draw_timeout_s 0.2 to make: lower the difficulty with "
        "--task_config, raise the limit or choose another task")


def test_the_flags_have_the_defaults_of_the_dataclass():
    assert options.part(JudgeConfig, options.parse([])) == JudgeConfig()


def test_answers_out_of_time_have_a_row_of_their_own():
    in_time = given_answer(1.0)
    late = rg.dataclasses.replace(given_answer(0.0), timed_out=True)
    rows = {row["metric"]: row for row in Evaluation([in_time, late], [in_time, in_time]).rows()}
    assert (rows["scorer_timeouts"]["value"], rows["scorer_timeouts"]["bare"]) == (0.5, 0.0)
    assert rows["solved"]["value"] == 0.5
    assert "scorer_timeouts" not in {row["metric"] for row in Evaluation([in_time]).rows()}
