"""Own data as a task: what is set aside, what is trained on, shares of a mix, plugins."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys

import pytest

from addon.streams import EpochStream, TrainStream, training_examples
from engine.records import normalise
from grpo.problems import TaskSource
from own_tasks import choice, trusted
from own_tasks import stream as stream_module
from own_tasks.choice import mix_weights, own_problems, own_task, tasks_with_own
from own_tasks.stream import StreamedTask
from own_tasks.table import OwnDataConfig
from own_tasks.task import OwnTask
from reasoning_gym_wrapper import EVAL_SEED, Reserve, Task, TaskError, registry
from tasks.chance import task_chances
from tasks.plugins import load_plugin
from test_architecture import ROOT
from tiny_rows import PLUGIN, sums, write


@pytest.fixture
def mine(tmp_path):
    return OwnTask(OwnDataConfig(write(tmp_path / "mine.jsonl", sums(60)), verifier="number"))


def questions(examples):
    return [normalise(example.question) for example in examples]


def test_it_looks_like_a_task(mine):
    reserve = Reserve([mine], 20)
    example = reserve.examples[0]
    assert mine.name == example.task == "mine"
    assert example.verify(f"It is {example.target}.").solved and not example.verify("-1").solved
    metadata = example.item["metadata"]
    assert metadata["row"].keys() == {"id"} and metadata["place"].startswith("mine.jsonl line ")
    assert 0 < task_chances(reserve.examples)["mine"].rate < 0.3
    json.dumps(example.item)


def test_evaluation_is_set_aside_first_and_never_trained_on(mine):
    reserve = Reserve([mine], 20)
    for stream in (training_examples([mine], reserve, 0, 0), training_examples([mine, Task("toy_add")], reserve, 0, 0)):
        drawn = {normalise(next(stream).question) for _ in range(200)}
        assert not drawn & reserve.questions
    assert len(reserve.questions) == 20


def test_what_is_set_aside_does_not_depend_on_the_order_of_the_rows(tmp_path, mine):
    rows = sums(60)
    random.Random(0).shuffle(rows)
    other = OwnTask(OwnDataConfig(write(tmp_path / "mine.jsonl", rows), verifier="number"))
    assert questions(Reserve([mine], 20).examples) == questions(Reserve([other], 20).examples)
    assert questions(Reserve([mine], 5).examples) == questions(Reserve([mine], 20).examples)[:5]
    assert questions(Reserve([mine], 20).examples) != questions(Reserve([mine], 20, EVAL_SEED + 1).examples)


def test_alone_it_is_a_fixed_set_of_all_other_rows(mine):
    reserve = Reserve([mine], 20)
    stream = training_examples([mine], reserve, 0, 0)
    assert isinstance(stream, EpochStream) and len(stream.examples) == 40
    assert len(training_examples([mine], reserve, 0, 7).examples) == 7
    assert len(training_examples([mine], reserve, 0, 700).examples) == 40
    first, again, other = ([next(stream).question for _ in range(80)] for stream in (
        training_examples([mine], reserve, seed, 0) for seed in (1, 1, 2)))
    assert first == again != other and sorted(first[:40]) == sorted(first[40:]) and first[:40] != first[40:]


def test_items_go_on_at_any_index(mine):
    for seed in (3, EVAL_SEED):
        whole = list(itertools.islice(mine.items(seed), 150))
        assert [index for index, _ in whole] == list(range(150))
        for start in (0, 59, 60, 61, 130):
            part = itertools.islice(mine.items(seed, start), 10)
            assert [(index, example.question) for index, example in part] == [
                (index, example.question) for index, example in whole[start : start + 10]]


def test_no_question_of_eval_data_is_trained_on_drawn_or_not(tmp_path):
    rows = sums(60)
    asked = [{**row, "question": row["question"].upper()} for row in rows[50:]] + [{"question": "new?", "answer": 1}]
    own = OwnTask(OwnDataConfig(write(tmp_path / "a.jsonl", rows), eval_data=write(tmp_path / "b.jsonl", asked)))
    reserve = Reserve([own], 4)
    stream = training_examples([own], reserve, 0, 0)
    assert len(stream.examples) == 50
    assert not set(questions(stream.examples)) & {normalise(row["question"]) for row in asked}
    assert set(questions(reserve.examples)) <= {normalise(row["question"]) for row in asked}
    assert own.notes() == ["a.jsonl: 10 rows ask a question of --eval_data and are not trained on"]


def test_a_name_of_reasoning_gyms_is_not_taken(tmp_path):
    assert OwnTask(OwnDataConfig(write(tmp_path / "chain_sum.jsonl", sums(3)))).name == "own_chain_sum"
    assert OwnTask(OwnDataConfig(write(tmp_path / "my data, new.jsonl", sums(3)))).name == "my_data_new"


@pytest.mark.parametrize(("rows", "eval_rows", "eval_n", "trains", "told"), [
    (60, 0, 60, True, "--data a.jsonl has 60 usable questions, too few to hold out --eval_n 60 of them: lower --eval_n "
     "to 12, or give --eval_data"),
    (60, 0, 59, True, None),
    (60, 0, 60, False, None),
    (60, 3, 4, True, "--eval_data b.jsonl has 3 usable questions, --eval_n 4 were asked for: lower --eval_n to 3"),
    (3, 60, 4, True, "--data a.jsonl: every question stands in --eval_data too, nothing is left to train on"),
    (3, 60, 4, False, None),
])
def test_too_few_rows_are_told_before_anything_loads(tmp_path, rows, eval_rows, eval_n, trains, told):
    data = write(tmp_path / "a.jsonl", sums(rows))
    other = write(tmp_path / "b.jsonl", sums(eval_rows)) if eval_rows else None
    assert own_problems([], OwnDataConfig(data, eval_data=other), None, eval_n, trains) == ([told] if told else [])


def test_the_shares_of_a_mix_are_kept(tmp_path, mine):
    tasks = [Task("toy_add"), mine]
    weights = mix_weights("mine=3", [task.name for task in tasks])
    assert weights == [1.0, 3.0]
    stream = training_examples(tasks, Reserve(tasks, 8), 0, 40, weights)
    assert [sum(example.task == name for example in stream.examples) for name in ("toy_add", "mine")] == [10, 30]
    assert isinstance(training_examples(tasks, Reserve(tasks, 8), 0, 0, weights), TrainStream)
    source = TaskSource(tuple(tasks), weights=tuple(weights))
    for seed, count in ((0, 30), (EVAL_SEED, 20)):  # evaluation keeps equal parts
        drawn = itertools.islice(source.problems(seed), 40)
        assert sum(problem.task == "mine" for problem in drawn) == count


@pytest.mark.parametrize(("mix", "told"), [
    ("your=2", "--mix names your, which is no task of this run: choose from toy_add, mine"),
    ("mine=2,mine=3", "--mix names mine twice: keep one"),
    ("mine=0", "--mix gives mine the weight 0: expected a number above 0"),
    ("mine=many", "--mix gives mine the weight many: expected a number above 0"),
    ("mine=inf", "expected a number above 0"),
    ("mine=nan", "expected a number above 0"),
])
def test_a_mix_that_cannot_be_is_one_line(mix, told):
    with pytest.raises(TaskError, match=told):
        mix_weights(mix, ["toy_add", "mine"])


# --- streams ---


@pytest.fixture
def large(tmp_path, monkeypatch) -> OwnTask:
    """1,500 rows that count as large, with a row of no use here and there."""
    monkeypatch.setattr(choice, "LARGE", 1000)
    monkeypatch.setattr(stream_module, "BUFFER", 100)
    rows = sums(1500)
    rows[10]["answer"] = rows[1400]["answer"] = ""
    return own_task(OwnDataConfig(write(tmp_path / "large.jsonl", rows), verifier="number"))


def test_large_data_are_read_as_a_stream_that_never_meets_its_evaluation(large):
    assert isinstance(large, StreamedTask) and len(large.table.items) == 999
    reserve = Reserve([large], 20)
    stream = training_examples([large], reserve, 0, 0)
    assert isinstance(stream, TrainStream)
    first, second = ([next(stream).question for _ in range(1450)] for _ in range(2))
    held_out = {normalise(row["question"]) for row in sums(1500)} - {normalise(text) for text in first + second}
    assert reserve.questions <= held_out and 20 <= len(held_out) <= 50
    assert first[:500] != second[:500] and first[:200] != [row["question"] for row in sums(200)]
    assert large.problems(20, True) == []


def test_a_stream_goes_on_at_any_index(large):
    for seed in (3, EVAL_SEED):
        whole = [example.question for _, example in itertools.islice(large.items(seed), 1600)]
        for start in (0, 7, 1500):
            part = itertools.islice(large.items(seed, start), 20)
            assert [(index, example.question) for index, example in part] == list(enumerate(whole))[start : start + 20]


def test_a_stream_keeps_off_all_of_eval_data(tmp_path, monkeypatch):
    monkeypatch.setattr(choice, "LARGE", 1000)
    own = OwnDataConfig(write(tmp_path / "a.jsonl", sums(100)), eval_data=write(tmp_path / "b.jsonl", sums(30)))
    drawn = {normalise(example.question) for _, example in itertools.islice(own_task(own).items(0), 300)}
    assert drawn == {normalise(row["question"]) for row in sums(100)[30:]}
    (line,) = own_problems([], own, None, 5, True, is_fixed=True)
    assert "are large and read as a stream: --epochs and --cache_hidden need a fixed set, choose --train_n" in line


# --- a user's verifier ------------------------------------------------------------------------------------------------


def test_a_verifier_that_fails_gold_answers_leaves_their_rows_out(tmp_path, monkeypatch):
    (tmp_path / "judges_of_rows.py").write_text(
        "def small(answer, entry):\n    assert entry['metadata']['row']['id'] < 1, 'too large'\n    return answer == "
        "entry['answer']\n"
        "def never(answer, entry): return 0\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    data = write(tmp_path / "a.jsonl", sums(60))
    monkeypatch.setattr(trusted, "_typed", {"judges_of_rows:small", "judges_of_rows:never"})
    own = OwnTask(OwnDataConfig(data, verifier="judges_of_rows:small"))
    assert len(own.table.items) == 40
    assert own.notes()[0] == ("WARNING: a.jsonl line 41 has an answer on which --verifier judges_of_rows:small raises: "
                              "AssertionError: too large: left out")
    with pytest.raises(TaskError, match="none of its 60 rows can be used; the first: line 1 has an answer that the v"):
        OwnTask(OwnDataConfig(data, verifier="judges_of_rows:never"))


# --- plugins ----------------------------------------------------------------------------------------------------------

def test_a_plugin_adds_a_task_that_can_be_named(tmp_path):
    path = tmp_path / "doubles.py"
    path.write_text(PLUGIN + "TASKS = {'doubles': (Doubles, Config)}\n", encoding="utf-8")
    plugin = load_plugin(str(path))
    assert plugin.tasks == ("doubles",) and "doubles" in registry()
    assert load_plugin(str(path)) is plugin
    (task,) = tasks_with_own(["doubles"], '{"top": 30}', OwnDataConfig())
    example = Reserve([task], 5).examples[0]
    assert example.question.startswith("Twice ") and example.verify(example.target).solved

    # Another text of the same file replaces its tasks.
    path.write_text(PLUGIN + "TASKS = {'twice': (Doubles, Config)}\n", encoding="utf-8")
    assert load_plugin(str(path)).sha256 != plugin.sha256
    assert "twice" in registry() and "doubles" not in registry()


def test_a_plugin_may_register_with_reasoning_gym(tmp_path):
    path = tmp_path / "gym.py"
    path.write_text(PLUGIN + '''
from reasoning_gym.factory import ProceduralDataset, register_dataset

class GymDoubles(Doubles, ProceduralDataset):
    pass

register_dataset("gym_doubles", GymDoubles, Config)
''', encoding="utf-8")
    code = ("from tasks.plugins import load_plugin\nfrom reasoning_gym_wrapper import Task\n"
            f"print(load_plugin({str(path)!r}).tasks, next(Task('gym_doubles').items(0))[1].question)")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("('gym_doubles',) Twice ")


@pytest.mark.parametrize(("text", "told"), [
    (None, "cannot be read: No such file"),
    ("1 / 0", "raises when it is run .ZeroDivisionError: division by zero.: correct it"),
    ("def f(:", "raises when it is run .SyntaxError"),
    ("import sys; sys.exit(3)", "raises when it is run .SystemExit: 3"),
    (PLUGIN, "adds no task: expected TASKS = "),
    ("TASKS = [1]", "TASKS is list"),
    (PLUGIN + "TASKS = {'toy_add': (Doubles, Config)}", "there is a task toy_add already"),
    (PLUGIN + "TASKS = {'chain_sum': (Doubles, Config)}", "there is a task chain_sum already"),
    (PLUGIN + "TASKS = {'a b': (Doubles, Config)}", "'a b' is no name of a task"),
    (PLUGIN + "TASKS = {'abc': Doubles}", "task abc is no pair of classes"),
    (PLUGIN + "TASKS = {'abc': (Doubles, Doubles)}", "the config class of task abc is no dataclass"),
    (PLUGIN + "TASKS = {'abc': (Config, Config)}", "the data set class of task abc has no __getitem__"),
])
def test_a_file_that_is_no_plugin_is_one_line(tmp_path, text, told):
    path = tmp_path / "wrong.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=told) as error:
        load_plugin(str(path))
    assert "\n" not in str(error.value)
