"""`--curriculum`: Reasoning Gym's levels, held-out items of every level, the climb of a run, and its resume."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import pytest

import options
import train
from addon.curriculum import Curriculum, CurriculumConfig, curriculum_problems, ladder, level_configs
from addon.streams import TrainStream
from engine.records import normalise
from engine.report import stamped
from reasoning_gym_wrapper import Reserve, Task, TaskError
from tiny_runs import arguments, assert_same_run, error_lines, only_run

FAST = ("--task=gcd", "--curriculum", "--eval_every=2", "--max_steps=6", "--eval_n=4", "--curriculum_levels=3",
        "--max_new_tokens=2", "--curriculum_threshold=0.5")


def test_levels_are_those_of_reasoning_gym():
    task = Task("chain_sum", {"allow_negation": True})
    configs = level_configs(task)
    assert len(configs) == 11  # 2 to 12 terms
    assert configs[0] == {"allow_negation": True, "min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    assert configs[3] == {"allow_negation": True, "min_terms": 2, "max_terms": 5, "min_digits": 1, "max_digits": 4}
    assert level_configs(task, 3) == configs[:4] and level_configs(task, 99) == configs
    for step, config in zip(ladder(task, 3), configs, strict=False):
        assert step.config == config


def test_a_level_that_the_task_refuses_ends_the_ladder(monkeypatch):
    configs = [{"max_value": 9}, {"max_value": 19}, {"min_value": 5, "max_value": 1}, {"max_value": 29}]
    monkeypatch.setattr("addon.curriculum.level_configs", lambda task, highest: configs)
    assert [step.config for step in ladder(Task("toy_add"))] == configs[:2]
    monkeypatch.setattr("addon.curriculum.level_configs", lambda task, highest: configs[2:])
    with pytest.raises(TaskError, match="toy_add refuses the config"):
        ladder(Task("toy_add"))


def test_a_task_without_a_curriculum_is_refused_in_one_line():
    assert curriculum_problems(["gcd", "chain_sum"]) == []
    (line,) = curriculum_problems(["toy_add", "gcd"])
    assert line == "--curriculum: Reasoning Gym has no curriculum for toy_add: choose other tasks"


@pytest.mark.parametrize(
    ("argv", "told"),
    [("--curriculum --train_n 10", "--curriculum needs fresh items: --train_n 10 is a fixed set, choose 0"),
     ("--curriculum --eval_every 0", "--curriculum raises levels by evaluations: set --eval_every above 0"),
     ("--curriculum --curriculum_threshold 0", "--curriculum_threshold 0.0 is not legal")],
)
def test_flags_that_contradict_the_curriculum(argv, told):
    _, found = options.collect(argv.split())
    assert len(found) == 1 and found[0].startswith(told)


def config(n: int, highest: int = 0) -> CurriculumConfig:
    return CurriculumConfig(curriculum_threshold=0.5, curriculum_levels=highest, eval_n=n)


def climbed() -> Curriculum:
    return Curriculum([Task("chain_sum"), Task("gcd")], config(24, 3))


def test_no_question_trained_on_at_any_level_is_evaluated_at_any_level():
    whole = climbed()
    evaluated = {normalise(e.question) for levels in whole.held_out.values() for level in levels for e in level}
    assert evaluated == whole.reserve.questions and len(evaluated) > 150
    met = False
    for _ in range(4):
        stream = TrainStream(whole.tasks(), whole.reserve, 0)
        trained = {normalise(next(stream).question) for _ in range(400)}
        assert not trained & evaluated
        free = TrainStream(whole.tasks(), Reserve([], 0), 0)
        met |= bool({normalise(next(free).question) for _ in range(400)} & evaluated)
        whole.update({"chain_sum": 1.0, "gcd": 1.0})
    assert met, "without the reserve the same draws meet evaluation questions"


def test_a_small_level_keeps_half_of_its_questions_for_training():
    def questions(config, n):
        return len(Reserve([Task("chain_sum", config)], n, must_fill=False).examples)

    tiny = {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    total = questions(tiny, 1000)
    assert total < 300
    one = Curriculum([Task("chain_sum")], config(256, 1))
    assert len(one.held_out["chain_sum"][0]) == total // 2
    assert len(one.held_out["chain_sum"][1]) == 256


def test_a_task_begins_at_its_first_level_with_enough_questions_to_learn_from():
    assert climbed().starts == climbed().levels == {"chain_sum": 1, "gcd": 0}  # level 0: two one-digit numbers
    only = Curriculum([Task("letter_counting")], config(24, 1))
    assert only.levels == {"letter_counting": 0}


def test_items_that_are_too_long_do_not_hide_how_many_questions_a_level_has():
    """What `fits` leaves out is out of the evaluation; it says nothing of how much there is to learn from."""
    seen = []

    def fits(examples):
        seen.append(len(examples))
        return examples[1:]

    assert Curriculum([Task("chain_sum")], config(24, 2), fits).starts == {"chain_sum": 1}
    assert max(seen) == 48


def test_a_run_says_that_it_does_not_begin_at_the_bottom(tiny_host, tmp_path, capsys):
    few = ("--task=chain_sum", "--curriculum", "--eval_every=9", "--max_steps=1", "--eval_n=4", "--curriculum_levels=1",
           "--max_new_tokens=2")
    assert train.main(arguments(tiny_host, tmp_path, *few)) == 0
    out, err = capsys.readouterr()
    assert "curriculum: chain_sum begins at level 1, the first of 1,000 questions or more" in err
    assert "curriculum level: chain_sum 1 of 1" in out


def test_a_task_that_never_has_enough_questions_begins_at_the_bottom(monkeypatch):
    configs = [{"max_value": 5}, {"max_value": 9}]
    monkeypatch.setattr("addon.curriculum.level_configs", lambda task, highest: configs)
    few = Curriculum([Task("toy_add")], config(8))
    assert few.levels == {"toy_add": 0} and len(few.ladders["toy_add"]) == 2


def test_levels_go_up_one_by_one_at_the_threshold_and_stop_at_the_top():
    whole = climbed()
    assert whole.update({"chain_sum": 0.5, "gcd": 0.49}) == ["chain_sum"]
    assert whole.levels == {"chain_sum": 2, "gcd": 0} and whole.summary() == "chain_sum 2 of 3, gcd 0 of 3"
    for _ in range(5):
        whole.update({"chain_sum": 1.0, "gcd": 0.0})
    assert whole.levels["chain_sum"] == 3
    assert whole.tasks()[0].config["max_terms"] == 5
    rows = stamped(whole.rows(), 7, 1.5)
    assert [(r["step"], r["task"], r["metric"], r["value"]) for r in rows] == [
        (7, "chain_sum", "curriculum_level", 3), (7, "gcd", "curriculum_level", 0)]
    other = climbed()
    other.restore({"chain_sum": 2, "lcm": 4})
    assert other.levels == {"chain_sum": 2, "gcd": 0}


def test_a_level_whose_items_are_too_long_ends_the_ladder():
    def fits(examples):
        if max(len(e.question) for e in examples) > 85:
            raise ValueError("too long")
        return examples

    cut = Curriculum([Task("chain_sum")], config(8), fits)
    assert 1 < len(cut.ladders["chain_sum"]) < 11
    with pytest.raises(ValueError, match="too long"):
        Curriculum([Task("gcd")], config(8), lambda e: fits([type(e[0])("x" * 99, "1", "gcd", {}, None)]))


# --- a run ------------------------------------------------------------------------------------------------------------


def levels(run: Path) -> list[tuple[str, float]]:
    with open(run / "eval.csv", newline="", encoding="utf-8") as file:
        return [(row["step"], float(row["value"])) for row in csv.DictReader(file)
                if row["metric"] == "curriculum_level"]


@pytest.fixture
def solves_everything(monkeypatch):
    """The tiny host cannot learn gcd in six steps; what a rate does to the levels is under test, not the rate."""
    monkeypatch.setattr("addon.hooks.solved_rate", lambda answers: 1.0)


def test_a_run_climbs_and_its_resume_is_exact(tiny_host, tmp_path, solves_everything, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert train.main(arguments(tiny_host, whole, *FAST)) == 0
    err = capsys.readouterr().err
    assert "curriculum goes up to level gcd 1 of 3" in err and "begins at level" not in err
    assert train.main(arguments(tiny_host, parts, *FAST, "--save_every=3", "--lr_scheduler=cosine")) == 0
    run = only_run(parts)
    for folder in (run / "checkpoints").glob("step-*"):
        if int(folder.name.removeprefix("step-")) > 3:
            shutil.rmtree(folder)
    assert train.main(["--resume", str(run), "--save_dir", str(parts)]) == 0
    assert_same_run(only_run(whole), run)
    assert levels(run) == [("2", 0.0), ("4", 1.0), ("6", 2.0)]
    state = json.loads((run / "checkpoints" / "step-00000006" / "training_state.json").read_text(encoding="utf-8"))
    assert state["extra"]["curriculum"] == {"gcd": 2}
    assert "curriculum level: gcd 2 of 3" in capsys.readouterr().out


def test_a_run_that_solves_too_little_stays_where_it_is(tiny_host, tmp_path):
    assert train.main(arguments(tiny_host, tmp_path, *FAST, "--max_steps=4", "--curriculum_threshold=1")) == 0
    assert levels(only_run(tmp_path)) == [("2", 0.0), ("4", 0.0)]


def test_the_command_refuses_a_task_without_curriculum(tiny_host, tmp_path, capsys):
    assert train.main(arguments(tiny_host, tmp_path, "--curriculum", "--eval_every=2")) == 2
    assert error_lines(capsys.readouterr().err) == [
        "--curriculum: Reasoning Gym has no curriculum for toy_add: choose other tasks"]
    assert not list(tmp_path.iterdir())
