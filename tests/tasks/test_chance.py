"""tasks/chance.py: the best constant's rate on the very items, in the table, in eval.csv and in the first lines."""

from __future__ import annotations

import csv
import dataclasses

import pytest

import reasoning_gym_wrapper as rg
import train
from engine.report import format_table
from evaluation import OVERALL, Evaluation
from grpo.measure import stage_chance
from grpo.problems import Problem, problem_of
from reasoning_gym_wrapper import Reserve, Task
from tasks.chance import Chance, chance_notes, chance_of, chance_warnings, overall, task_chances
from tasks.toy_add import ToyAddConfig, ToyAddDataset
from test_evaluation import given_answer
from tiny_runs import arguments, only_run


def equal(gold: str, text: str) -> bool:
    return gold == text


@pytest.mark.parametrize(
    ("golds", "rate", "answer"),
    [(["7", "8", "7", "9"], 0.5, "7"), (["yes", "no", "no"], 2 / 3, "no"), (["x"], 1.0, "x"), (["1", "2"], 0.5, "1")],
)
def test_chance_is_the_commonest_gold_where_answers_are_compared(golds, rate, answer):
    assert chance_of(golds, golds, equal) == Chance(rate, answer, len(golds))


def test_a_word_that_the_scorer_accepts_is_found_though_it_is_no_gold():
    golds = ["0.25", "0.5", "0.125", "0.5"]
    best = chance_of(golds, golds, lambda gold, text: bool(text) and gold.startswith(text))
    assert (best.rate, best.answer) == (1.0, "0")
    assert chance_of([1, 2], [None, None], lambda item, text: text == "yes") == Chance(1.0, "yes", 2)
    assert chance_of([1, 2], [None, None], lambda item, text: False).rate == 0.0


def test_a_search_that_runs_out_of_time_says_so():
    golds = ["7", "8", "7"]
    best = chance_of(golds, golds, lambda gold, text: pytest.fail("asked"), seconds=-1)
    assert best == Chance(2 / 3, "7", 3, is_whole=False)
    (_, note) = chance_notes({"slow": best, "fast": Chance(0.1, "1", 9)})
    assert note == "chance of slow is the least it can be, its scorer is slow"


def test_each_task_has_its_own_constant():
    examples = Reserve([Task("toy_add", {"max_value": 2}), Task("coin_flip")], 8, must_fill=False).examples
    chances = task_chances(examples)
    sums = [example for example in examples if example.task == "toy_add"]
    golds = [example.target for example in sums]
    assert chances["toy_add"].rate == max(map(golds.count, golds)) / len(golds)
    counted = sum(chance.rate * chance.n for chance in chances.values())
    assert overall(chances) == counted / len(examples)


def test_tasks_whose_accuracy_means_little_are_named():
    lines = chance_warnings({"syllogism": Chance(0.742, "Yes", 256), "sums": Chance(0.03, "7", 256)})
    assert lines == ["syllogism: the constant answer 'Yes' solves 74.2 % of its 256 evaluation items: its accuracy "
                     "means little"]


def test_a_task_whose_question_ends_with_its_answer_is_named():
    examples = Reserve([Task("string_insertion"), Task("coin_flip")], 30, must_fill=False).examples
    given = [example for example in examples if example.task == "string_insertion"]
    chances = task_chances(examples)
    same = sum(example.entry["metadata"]["string"] == example.target for example in given)
    assert chances["string_insertion"].copied == same / len(given) > 0.5 and chances["coin_flip"].copied == 0.0
    (line,) = chance_warnings(chances)
    assert line.startswith("string_insertion: the last word of the question, given back, solves ")


def test_rows_and_table_carry_chance():
    answers = [given_answer(1.0, "a"), given_answer(0.0, "b"), given_answer(0.0, "b")]
    evaluation = Evaluation(answers, answers, {"a": Chance(1.0, "x", 1), "b": Chance(0.5, "y", 2)})
    rows = {row["task"]: row["chance"] for row in evaluation.rows() if row["metric"] == "solved"}
    assert rows == {"a": 1.0, "b": 0.5, OVERALL: 2 / 3}
    heading, first, *_ = format_table(evaluation.table()).split("\n")
    assert heading.split()[-1] == "chance" and first.endswith("100.0 %")
    assert "chance" not in format_table(Evaluation(answers).table())


class Always(ToyAddDataset):
    """A scorer that anything satisfies."""

    def score_answer(self, answer, entry):
        return 1.0


def test_a_run_names_such_a_task_first_and_writes_chance_down(tiny_host, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(rg, "registry", lambda: {"any_add": (Always, ToyAddConfig)})
    assert train.main(arguments(tiny_host, tmp_path, "--task=any_add", "--max_steps=1")) == 0
    out, err = capsys.readouterr()
    warning = "solves 100.0 % of its 4 evaluation items: its accuracy means little"
    assert err.index(warning) < err.index("trainable")
    assert out.splitlines()[0].split()[-1] == "chance" and out.splitlines()[1].split()[-2:] == ["100.0", "%"]
    with open(only_run(tmp_path) / "eval.csv", newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["metric"] == "solved"]
    assert [(row["task"], row["chance"], row["n"]) for row in rows] == [("any_add", "1", "4")]


def test_grpo_measures_the_chance_of_a_stage():
    drawn = [problem_of(example) for example in Reserve([Task("toy_add", {"max_value": 1})], 3).examples]
    golds = [problem.answer for problem in drawn]
    chance = stage_chance(drawn)
    assert chance.rate == max(map(golds.count, golds)) / len(golds)
    program = dataclasses.replace(drawn[0], tests=("assert True",))
    assert stage_chance([program]) is None and stage_chance([]) is None
    assert isinstance(program, Problem)
