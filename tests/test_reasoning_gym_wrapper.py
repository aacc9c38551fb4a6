"""reasoning_gym_wrapper: evaluation items first, balance, honest scores, clear refusals, exact resume."""

from __future__ import annotations

import collections
import dataclasses
import inspect
import itertools
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import options
import reasoning_gym_wrapper as rg
from addon.streams import EpochStream, TrainStream, beyond_reserve, training_examples
from engine.records import normalise
from patience import HANG_S
from reasoning_gym_wrapper import EVAL_SEED, SEED_GAP, Example, Reserve, Task, TaskError, train_seed
from tasks.built_in import BUILT_IN
from tasks.toy_add import ToyAddDataset

ROOT = Path(__file__).resolve().parent.parent
PUBLISHED = ["basic_arithmetic", "gsm_symbolic", "chain_sum", "simple_equations"]
SLOW_ITEMS = {"arc_agi", "knight_swap", "group_anagrams", "acre"}  # a tenth of a second and more for each item
ALL_TASKS = sorted(set(rg.registry()) - set(BUILT_IN))


def take(items, n: int) -> list:
    return list(itertools.islice(items, n))


def toy(**config) -> Task:
    return Task("toy_add", config)


def text_of(examples) -> list[tuple[str, str, str]]:
    return [(example.task, example.question, example.target) for example in examples]


@pytest.fixture(scope="module")
def published() -> list[Task]:
    return rg.make_tasks(PUBLISHED, "small")


@pytest.fixture(scope="module")
def every_task() -> dict[str, dict[str, Task]]:
    return {level: {name: rg.make_tasks([name], level)[0] for name in ALL_TASKS} for level in ("small", "default")}


# --- the evaluation set and training beside it ------------------------------------------------------------------------


@pytest.mark.parametrize("train_n", [0, 1200], ids=["endless", "fixed"])
def test_no_evaluation_question_is_ever_trained_on(published, train_n):
    reserve = Reserve(published, 256)
    stream = training_examples(published, reserve, 0, train_n)
    trained = take(stream, 1200)
    asked = {" ".join(example.question.lower().split()) for example in trained}
    for task in PUBLISHED:
        evaluated = [" ".join(e.question.lower().split()) for e in reserve.examples if e.task == task]
        assert len(evaluated) == len(set(evaluated)) == 256, task
        assert not asked & set(evaluated), task

    # The rule bites: without the reserve, the same draws meet evaluation questions.
    free = take(training_examples(published, Reserve(published, 0), 0, train_n), 1200)
    assert any(example.question in reserve for example in free)


def grid_of(example: Example) -> str:
    """The solved grid as the verifier knows it, read apart from the code under test."""
    return str(example.entry["metadata"]["solution"])


@pytest.mark.parametrize("train_n", [0, 600], ids=["endless", "fixed"])
def test_no_solved_grid_of_the_evaluation_is_ever_trained_on(train_n):
    sudoku = Task("mini_sudoku")
    reserve = Reserve([sudoku], 128)
    stream = training_examples([sudoku], reserve, 0, train_n)
    trained = {grid_of(example) for example in take(stream, 600)}
    evaluated = {grid_of(example) for example in reserve.examples}
    assert len(evaluated) > 30 and len(trained) > 150 and not trained & evaluated
    # The rule bites: by question alone, the same draws train on most of the grids that are evaluated.
    loose = Reserve([sudoku], 128, by_group=False)
    free = {grid_of(example) for example in take(training_examples([sudoku], loose, 0, train_n), 600)}
    assert len(free & {grid_of(example) for example in loose.examples}) > 50


def test_the_split_by_grid_does_not_depend_on_how_many_are_evaluated():
    sudoku = Task("mini_sudoku")
    few, many = Reserve([sudoku], 4), Reserve([sudoku], 40)
    assert text_of(few.examples) == text_of(many.examples[:4])
    items = [example for _, example in itertools.islice(sudoku.items(5), 300)]
    assert [few.rejects(e) for e in items] == [many.rejects(e) for e in items]
    share = len({grid_of(e) for e in items if few.rejects(e)}) / len({grid_of(e) for e in items})
    assert 0.1 < share < 0.3
    assert Task("toy_add").items(0).__next__()[1].group is None


def test_questions_are_compared_as_normalised_text():
    assert normalise("  What IS\n\t1 + 2? ") == normalise("what is 1 + 2?") == "what is 1 + 2?"
    reserve = Reserve([toy(max_value=1)], 1)
    [example] = reserve.examples
    assert example.question.upper().replace(" ", "  ") in reserve


def test_evaluation_comes_first_whatever_is_trained(published):
    reserves = [Reserve(published, 20), Reserve(published, 20)]
    take(training_examples(published, reserves[0], 3, 0), 50)
    assert text_of(reserves[0].examples) == text_of(reserves[1].examples) == text_of(Reserve(published, 20).examples)


@settings(max_examples=15)
@given(st.integers(0, 60), st.integers(0, 60), st.integers(0, 2**31))
def test_a_larger_reserve_starts_with_the_smaller_one(small, large, seed):
    small, large = sorted((small, large))
    # The tasks overlap and collide: neither may change what the other keeps.
    tasks = [toy(max_value=9), toy(max_value=10), Task("chain_sum", {"max_terms": 2, "max_digits": 1})]
    few, many = Reserve(tasks, small, seed), Reserve(tasks, large, seed)
    for place in range(len(tasks)):
        of = [r.examples[place * n : (place + 1) * n] for r, n in ((few, small), (many, large))]
        assert text_of(of[0]) == text_of(of[1][:small])
        assert len({normalise(example.question) for example in of[1]}) == large
    assert few.questions <= many.questions == {normalise(example.question) for example in many.examples}


def test_a_reserve_larger_than_all_questions_is_a_clear_error():
    with pytest.raises(TaskError) as caught:
        Reserve([toy(max_value=3)], 17)
    message = str(caught.value)
    assert "toy_add" in message and "only 16 distinct" in message and "17" in message and "--eval_n" in message
    partial = Reserve([toy(max_value=3)], 17, must_fill=False)
    assert len(partial.examples) == len(partial.questions) == 16


def test_nothing_left_to_train_on_is_a_clear_error():
    task = toy(max_value=3)
    stream = TrainStream([task], Reserve([task], 16), 0)
    with pytest.raises(TaskError, match="evaluation questions, nothing is left to train on: lower --eval_n"):
        next(stream)


SEEDS = st.integers(0, 2**31 - 1)
TOY = toy()


@given(SEEDS, st.integers(0, 10**8), st.integers(EVAL_SEED, 2**32 - 1))
def test_training_never_comes_near_an_evaluation_seed(seed, drawn, eval_seed):
    """Items are drawn with Random(data seed + index): after 100 million of them the gap still stands."""
    stream = training_examples([TOY], Reserve([], 0), seed, 0)
    assert stream.seed == train_seed(seed) >= 0
    assert eval_seed - (stream.seed + drawn) >= SEED_GAP == 10**7


@given(st.sets(st.integers(0, 10**8), min_size=2, max_size=2))
def test_training_runs_do_not_share_their_items(seeds):
    assert len(set(map(train_seed, seeds))) == 2
    first = sorted(map(train_seed, range(89)))
    assert min(later - sooner for sooner, later in itertools.pairwise(first)) >= SEED_GAP


def test_the_seeds_of_the_command_line_are_those_of_the_property():
    flags = {flag.name: flag for flag in options.FLAGS}
    assert flags["seed"].low == 0 and flags["seed"].high == 2**31 and flags["seed"].exclusive_high
    assert flags["eval_seed"].default == EVAL_SEED == flags["eval_seed"].low and flags["eval_seed"].high == 2**32


# --- streams ----------------------------------------------------------------------------------------------------------


def counts(examples, tasks) -> list[int]:
    found = collections.Counter(example.task for example in examples)
    return [found[task.name] for task in tasks]


def test_every_prefix_of_the_stream_is_balanced_to_within_one(published):
    tasks = [*published, toy(max_value=5)]  # half of toy_add's draws are rejected
    drawn = take(TrainStream(tasks, Reserve([toy(max_value=5)], 18), 0), 203)
    for length in range(len(drawn) + 1):
        of = counts(drawn[:length], tasks)
        assert max(of) - min(of) <= 1


@pytest.mark.parametrize("weights", [(1, 3), (2.5, 0.5, 1), (1, 1, 1)])
def test_every_prefix_of_a_weighted_stream_is_near_its_shares(weights):
    tasks = [Task("toy_add", {"max_value": 90 + place}) for place in range(len(weights))]
    stream = TrainStream(tasks, Reserve([], 0), 0, weights)
    drawn = [example.source for example in take(stream, 60)]
    for length in range(len(drawn) + 1):
        for task, weight in zip(tasks, weights, strict=True):
            assert abs(drawn[:length].count(task) - length * weight / sum(weights)) < len(weights)


def test_a_weighted_stream_resumes_exactly_at_any_point():
    tasks, weights = [toy(), Task("toy_add", {"max_value": 5})], (1, 3)
    stream, resumed = (TrainStream(tasks, Reserve([], 0), 0, weights) for _ in range(2))
    for _ in range(9):
        take(stream, 1)
        resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
        ahead = TrainStream(tasks, Reserve([], 0), 0, weights)
        ahead.load_state_dict(stream.state_dict())
        assert text_of(take(resumed, 7)) == text_of(take(ahead, 7))


@pytest.mark.parametrize("n", [1, 5, 8, 103])
def test_a_fixed_training_set_is_balanced_and_comes_whole_each_epoch(published, n):
    stream = training_examples(published, Reserve(published, 8), 0, n)
    assert isinstance(stream, EpochStream)
    epochs = [take(stream, n) for _ in range(3)]
    for epoch in epochs:
        assert sorted(text_of(epoch)) == sorted(text_of(stream.examples)) and len(epoch) == n
        assert max(counts(epoch, published)) - min(counts(epoch, published)) <= 1
    if n > 8:
        assert text_of(epochs[0]) != text_of(epochs[1])


def test_streams_depend_on_the_seed_alone():
    task = toy()
    for n in (0, 40):
        first, again, other = (training_examples([task], Reserve([task], 8), seed, n) for seed in (1, 1, 2))
        first = text_of(take(first, 40))
        assert first == text_of(take(again, 40)) != text_of(take(other, 40))


@settings(max_examples=30)
@given(st.integers(0, 1100), st.integers(1, 20), st.integers(0, 3))
def test_a_stream_resumes_exactly_at_any_point(split, after, seed):
    """`split` passes the border of a chunk; one in two draws is rejected, one in three indices cannot be made."""
    tasks = [toy(max_value=4), Flaky.task()]
    reserve = Reserve([toy(max_value=4)], 12)
    stream = TrainStream(tasks, reserve, seed)
    take(stream, split)
    state = json.loads(json.dumps(stream.state_dict()))
    resumed = TrainStream(tasks, reserve, seed)
    resumed.load_state_dict(state)
    assert text_of(take(resumed, after)) == text_of(take(stream, after))
    assert resumed.state_dict() == stream.state_dict()


@settings(max_examples=30)
@given(st.integers(1, 30), st.integers(0, 100), st.integers(1, 100), st.integers(0, 3))
def test_a_fixed_set_resumes_exactly_at_any_point(n, split, after, seed):
    task = toy()
    stream, resumed = (training_examples([task], Reserve([task], 8), seed, n) for _ in range(2))
    take(stream, split)
    resumed.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert text_of(take(resumed, after)) == text_of(take(stream, after))


# --- items ------------------------------------------------------------------------------------------------------------


class Flaky(ToyAddDataset):
    """Gives up at every third seed, or at all of them."""

    every = False

    def __getitem__(self, index: int):
        if self.every or (self.seed + index) % 3 == 1:
            raise RuntimeError("no path in this maze")
        return super().__getitem__(index)

    @classmethod
    def task(cls) -> Task:
        task = toy(min_value=100, max_value=999)
        task.name, task._dataset_class = "flaky", cls
        return task


class Hopeless(Flaky):
    every = True


def test_an_index_at_which_the_generator_fails_is_passed_over():
    items = take(Flaky.task().items(0), 700)
    assert [index for index, _ in items] == [index for index in range(1050) if index % 3 != 1]
    plain = dict(take(toy(min_value=100, max_value=999).items(0), 1050))
    assert all(example.question == plain[index].question for index, example in items)


def test_a_generator_that_always_fails_is_a_clear_error():
    with pytest.raises(TaskError, match=r"task flaky failed to make \d+ items in a row: no path in this maze"):
        next(Hopeless.task().items(0))


def test_gsm_symbolic_goes_on_past_the_size_of_its_data_set():
    task = Task("gsm_symbolic")
    with pytest.raises(IndexError):
        task.scorer[rg.CHUNK]
    items = take(task.items(7, rg.CHUNK - 2), 4)
    assert [index for index, _ in items] == [498, 499, 500, 501]
    assert text_of(e for _, e in items[2:]) == text_of(e for _, e in take(task.items(7 + rg.CHUNK), 2))


def test_items_do_not_depend_on_the_global_generator_and_leave_it_alone():
    drawn = []
    for state in (1, 2):
        random.seed(state)
        before = random.getstate()
        drawn.append(text_of(example for _, example in take(Task("list_functions").items(5), 40)))
        assert random.getstate() == before
    assert drawn[0] == drawn[1]


def test_toy_add_is_two_number_addition():
    for index, example in take(toy(min_value=3, max_value=12).items(11), 50):
        a, b = map(int, re.fullmatch(r"What is (\d+) \+ (\d+)\?", example.question).groups())
        assert 3 <= a <= 12 and 3 <= b <= 12 and example.target == str(a + b)
        assert example.verify(f" {a + b}\n").solved and not example.verify(str(a + b + 1)).solved
        metadata = example.item["metadata"]
        assert metadata["task"] == "toy_add" and metadata["source_index"] == index


@pytest.mark.parametrize("name", [*PUBLISHED, "calendar_arithmetic", *BUILT_IN])
def test_items_name_their_task_and_their_verifier_still_knows_gold(name):
    """calendar_arithmetic keeps a `task` of its own in the metadata, which its verifier reads."""
    for _, example in take(Task(name).items(0), 20):
        assert example.item["metadata"]["task"] == example.task == name
        assert example.item["question"] == example.question and example.item["answer"] == example.target
        assert example.verify(example.target).score == 1.0
        assert example.item["metadata"]["task"] == name


# --- verdicts ---------------------------------------------------------------------------------------------------------


def test_a_wrong_number_in_gsm_symbolic_scores_a_little_and_is_not_solved():
    _, example = next(Task("gsm_symbolic").items(3))
    wrong = example.verify(str(int(float(example.target)) + 1))
    assert wrong == rg.Verdict(0.01) and not wrong.solved and not wrong.raised
    right = example.verify(example.target)
    assert right == rg.Verdict(1.0) and right.solved


def test_a_scorer_that_raises_scores_zero_and_says_so():
    _, example = next(Task("prime_factorization").items(0))
    with pytest.raises(ValueError):
        example.source.scorer.score_answer("I do not know", example.entry)
    assert example.verify("I do not know") == rg.Verdict(0.0, raised=True)
    assert example.verify(example.target) == rg.Verdict(1.0)


@pytest.mark.parametrize(
    ("score", "verdict"),
    [(1, 1.0), (0.01, 0.01), (True, 1.0), (1.5, 1.0), (-1, 0.0), (float("nan"), 0.0), (0.9999, 0.9999)],
)
def test_scores_stay_in_their_range_and_only_a_full_one_is_solved(score, verdict):
    class Scorer:
        def score_answer(self, answer, entry):
            return score

    source = toy()
    source.scorer = Scorer()
    found = Example("q", "a", "toy_add", {"metadata": {}}, source).verify("x")
    assert found == rg.Verdict(verdict) and found.solved == (verdict == 1.0)


# --- refusals ---------------------------------------------------------------------------------------------------------


def problems(names, config="default", allow_code=False, supervised=True) -> list[str]:
    found = rg.task_problems(names, config, allow_code, supervised)
    assert all("\n" not in line for line in found)
    return found


@pytest.mark.parametrize("name", sorted(rg.NO_GOLD))
def test_tasks_without_gold_answers_are_refused_for_supervised_training(name):
    [line] = problems([name])
    assert name in line and "no gold answers" in line and "supervised" in line
    assert problems([name], supervised=False) == []
    stream = TrainStream(rg.make_tasks([name], "default"), Reserve([], 0), 0)
    with pytest.raises(TaskError, match=f"{name} has an item without a gold answer"):
        next(stream)


@pytest.mark.parametrize("name", sorted(rg.EXECUTES_CODE))
def test_tasks_that_execute_code_need_the_flag(name):
    [line] = problems([name])
    assert name in line and "executes code" in line and "--allow_code_tasks" in line
    assert problems([name], allow_code=True) == []


def test_every_scorer_that_evaluates_the_answer_is_among_the_tasks_that_execute_code():
    """Reads the scorers of all tasks: eval, exec or parse_expr of anything but the gold entry."""
    runs = re.compile(r"\b(?:eval|exec|parse_expr|sympify)\((?!entry|metadata)")
    found = {n for n in ALL_TASKS if runs.search(inspect.getsource(rg.registry()[n][0].score_answer))}
    assert {"countdown", "n_queens", "polynomial_multiplication"} <= found <= set(rg.EXECUTES_CODE)


def test_an_unknown_task_is_answered_with_the_three_nearest():
    [line] = problems(["chain_summ"])
    assert line.startswith("unknown task 'chain_summ'")
    near = line.split("the nearest names are ")[1].split(", ")
    assert len(near) == 3 and near[0] == "chain_sum" and set(near) <= set(rg.registry())
    with pytest.raises(TaskError, match="the nearest names are gsm_symbolic, "):
        Task("gsm_symbolics")
    assert len(problems(["!?"])) == 1


def test_all_problems_are_told_at_once():
    found = problems(["chain_summ", "codeio", "graph_color", "toy_add", "toy_add"], '{"no_such": 1}')
    for word in ("chain_summ", "codeio executes code", "graph_color has no gold", "toy_add is named twice", "no_such"):
        assert any(word in line for line in found), word


def test_warnings_tell_of_tasks_whose_figures_mislead():
    assert rg.task_warnings(PUBLISHED) == []
    [line] = rg.task_warnings(["chain_sum", "game_of_life_halting"])
    assert "game_of_life_halting" in line and "full score" in line and "solved goes by the strict rule" in line
    [line] = rg.task_warnings(["game_of_life_halting"], is_strict=False)
    assert line.endswith("none of its figures means anything without --verifier_strict 1")
    # The flag is that of the process: pytest itself may run under PYTHONHASHSEED=0.
    for seed, expected in (("random", True), ("0", False)):
        code = "import reasoning_gym_wrapper as rg; print(rg.task_warnings(['word_ladder']))"
        env = {**os.environ, "PYTHONHASHSEED": seed}
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=HANG_S)
        assert ("PYTHONHASHSEED" in done.stdout) == expected, done.stderr


# --- difficulty -------------------------------------------------------------------------------------------------------


def test_small_is_two_to_three_terms_of_one_to_two_digits():
    for _, example in take(rg.make_tasks(["chain_sum"], "small")[0].items(0), 60):
        numbers = re.findall(r"\d+", example.question)
        assert 2 <= len(numbers) <= 3 and all(len(number) <= 2 for number in numbers)
    for _, example in take(rg.make_tasks(["basic_arithmetic"], "small")[0].items(0), 60):
        numbers = re.findall(r"\d+", example.question)
        assert 2 <= len(numbers) <= 3 and all(len(number) <= 2 for number in numbers)


def test_default_is_the_tasks_own_config():
    assert rg.read_task_config("default", ["chain_sum", "maze"]) == {"chain_sum": {}, "maze": {}}
    assert rg.make_tasks(["chain_sum"], "default")[0].scorer.config.max_terms == 6


@pytest.mark.parametrize("write", [json.dumps, lambda config: "\n".join(f"{k}: {v}" for k, v in config.items())])
@pytest.mark.parametrize("suffix", ["json", "yaml"])
def test_a_config_comes_from_a_file_or_from_the_command_line(tmp_path, write, suffix):
    config = {"min_terms": 4, "max_terms": 5}
    path = tmp_path / f"tasks.{suffix}"
    path.write_text(write(config), encoding="utf-8")
    for text in (str(path), json.dumps(config), " " + json.dumps(config)):
        [task] = rg.make_tasks(["chain_sum"], text)
        assert (task.config, task.scorer.config.max_terms) == (config, 5)
        assert problems(["chain_sum"], text) == []


def test_a_mapping_by_task_gives_each_task_its_own(tmp_path):
    config = {"chain_sum": {"max_terms": 9}, "toy_add": {"max_value": 5}}
    tasks = rg.make_tasks(["toy_add", "chain_sum", "maze"], json.dumps(config))
    assert [task.config for task in tasks] == [{"max_value": 5}, {"max_terms": 9}, {}]
    path = tmp_path / "tasks.yaml"
    path.write_text("chain_sum:\n  max_terms: 9\n", encoding="utf-8")
    assert rg.read_task_config(str(path), ["toy_add", "chain_sum"]) == {"toy_add": {}, "chain_sum": {"max_terms": 9}}


def test_one_mapping_is_for_every_task():
    tasks = rg.make_tasks(["chain_sum", "basic_arithmetic"], '{"max_terms": 3}')
    assert [task.scorer.config.max_terms for task in tasks] == [3, 3]


@pytest.mark.parametrize(
    ("names", "config", "words"),
    [
        (["chain_sum"], '{"max_term": 3}', ["chain_sum has no config field max_term", "max_terms"]),
        (["chain_sum"], '{"seed": 3}', ["has no config field seed"]),
        (["chain_sum"], '{"size": 3, "x": 1}', ["has no config field size, x"]),
        (["chain_sum"], '{"min_terms": 0}', ["chain_sum refuses the config", '{"min_terms": 0}', "must be positive"]),
        (["chain_sum"], '{"min_terms": 5, "max_terms": 2}', ["max_terms must be >= min_terms"]),
        (["chain_sum"], '{"min_terms": "two"}', ["chain_sum refuses the config"]),
        (["chain_sum"], '{"min_terms": null}', ["chain_sum refuses the config"]),
        (["spell_backward"], '{"data_file": "nowhere"}', ["spell_backward refuses the config", "No such file"]),
        (["calendar_arithmetic"], '{"tasks": [1]}', ["calendar_arithmetic refuses the config"]),
        (["toy_add"], '{"min_value": 9, "max_value": 3}', ["toy_add refuses the config", "min_value <= max_value"]),
        (["chain_sum", "maze"], '{"chain_sum": {"max_term": 3}}', ["chain_sum has no config field max_term"]),
        (["chain_sum"], "{not json", ["--task_config cannot be read"]),
        (["chain_sum"], "smal", ["--task_config 'smal' is no file", "small, default"]),
        (["chain_sum"], "x" * 5000, ["is no file"]),
        (["chain_sum"], "a\0b", ["is no file"]),
        (["chain_sum"], "list.yaml", ["must hold a mapping", "list"]),
        (["chain_sum"], "empty.yaml", ["must hold a mapping"]),
        (["chain_sum"], "date.yaml", ["chain_sum refuses the config", "2020-01-01"]),
        (["chain_sum"], "number.yaml", ["has no config field 1"]),
        (["chain_sum"], "binary.yaml", ["cannot be read", "binary.yaml is not UTF-8 text (line 1"]),
        (["chain_sum"], "deep.yaml", ["cannot be read", "nested too deeply"]),
    ],
)
def test_a_bad_config_is_one_clear_line(tmp_path, monkeypatch, names, config, words):
    files = {"list.yaml": "- 1\n", "empty.yaml": "", "date.yaml": "min_terms: 2020-01-01\n", "number.yaml": "1: 2\n",
             "deep.yaml": "[" * 3000}
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x81")
    monkeypatch.chdir(tmp_path)
    [line] = problems(names, config)
    for word in words:
        assert word in line
    with pytest.raises(TaskError):
        rg.make_tasks(names, config)


# --- all 105 tasks ----------------------------------------------------------------------------------------------------


def test_all_105_tasks_start_at_both_difficulties(every_task):
    assert len(ALL_TASKS) == 105
    for name in ALL_TASKS:
        small, default = (every_task[level][name] for level in ("small", "default"))
        fields = {field.name for field in dataclasses.fields(type(small.scorer.config))}
        refused = name == "number_sequence"  # it needs four terms to show its pattern, and keeps its own config
        assert set(small.config) == (set() if refused else fields & set(rg.SMALL_FIELDS)), name
        assert default.config == {}, name


def check_items(task: Task, n: int) -> None:
    items = take(task.items(123), n)
    for _, example in items:
        assert isinstance(example.question, str) and example.question.strip(), task.name
        assert example.item["metadata"]["task"] == task.name
        assert (example.target is None) == (task.name in rg.NO_GOLD), task.name
        if example.target is not None:
            assert isinstance(example.target, str), task.name
            # What a model can generate is stripped text.
            assert example.verify(example.target.strip()) == rg.Verdict(1.0), (task.name, example.target)
        right = example.verify("I do not know").score == 1.0
        assert not right or task.name in rg.SCORES_ANYTHING, task.name
    [(index, first)] = take(task.items(123, items[-1][0]), 1)
    assert index == items[-1][0] and text_of([first]) == text_of([items[-1][1]]), f"{task.name} cannot resume mid-way"


def test_gold_verifies_and_items_resume_in_every_quick_task(every_task):
    for name in sorted(set(ALL_TASKS) - SLOW_ITEMS):
        check_items(every_task["default"][name], 2)


@pytest.mark.slow
def test_gold_verifies_and_items_resume_in_every_task(every_task):
    for level in ("small", "default"):
        for name in ALL_TASKS:
            check_items(every_task[level][name], 12)


# --- without reasoning-gym --------------------------------------------------------------------------------------------


@pytest.fixture
def no_reasoning_gym(monkeypatch):
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)


def test_toy_add_stands_in_loudly_when_reasoning_gym_is_missing(no_reasoning_gym, capsys):
    assert list(rg.registry()) == list(BUILT_IN)
    assert rg.default_tasks() == ["toy_add"]
    told = capsys.readouterr().err
    assert told.startswith("WARNING: reasoning-gym is not installed") and "toy_add" in told and "pip install" in told
    assert len(Reserve(rg.make_tasks(["toy_add"], "small"), 50).examples) == 50


def test_a_named_task_is_refused_when_reasoning_gym_is_missing(no_reasoning_gym):
    [line] = problems(["chain_sum"], "small")
    assert "unknown task 'chain_sum'" in line and "reasoning-gym is not installed: pip install reasoning-gym" in line


def test_the_default_tasks_are_quiet_when_it_is_there(capsys):
    assert rg.default_tasks() == ["chain_sum", "basic_arithmetic"]
    assert capsys.readouterr().err == ""


def test_items_beyond_the_reserve_are_told_unless_whole_groups_are_kept_apart():
    (line,) = beyond_reserve(["mini_sudoku"], 4, by_group=False)
    assert line.startswith("WARNING: training kept off the first 4 evaluation items of each task")
    assert beyond_reserve(["mini_sudoku"], 4, by_group=True) == []
    assert beyond_reserve(["mini_sudoku", "gcd"], 4, by_group=True) == [line]
