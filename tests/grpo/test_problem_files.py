"""grpo.problem_files: every form of a row with an obvious meaning is read, every other one is refused by its line."""

from __future__ import annotations

import json
import re

import pytest

from enhanced.reasoning_format import split_completion
from grpo.measure import judge
from grpo.problem_files import file_source
from grpo.rewards import build_rewards
from sandbox.runner import confinement

OTHER = {"prompt": "Another question?", "answer": "42"}  # a file needs two problems
CODE = {"prompt": "Write add(a, b).", "code": "def add(a, b):\n    return a + b"}
ASSERTS = ("assert add(1, 2) == 3", "assert add(0, 0) == 0")
CHECK = "def check(candidate):\n    assert candidate(1, 2) == 3"


def read(tmp_path, *rows):
    path = tmp_path / "problems.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (*rows, OTHER)), encoding="utf-8")
    return file_source(path).rows


def reward_of(problem, name):
    (function,), _ = build_rewards({name: 1.0}, allow_unconfined_code=confinement() is not None)
    return judge([problem], [problem.worked()], [function])[name]


# --- answers and prompts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("answer", "text"), [
    ("9", "9"), (9, "9"), (0, "0"), (-2.5, "-2.5"), (" 9 \r\n", "9"), (["9"], "9"), (["Paris", "paris"], "Paris"),
    (["70,000", "70000"], "70,000"), ("12 - 3 = <<12-3=9>>9 pears.\n#### 9", "9"), ("#### 70,000", "70,000"),
    ("so <<4*2=8>>8", "so 8"), ("a\u2028b", "a\u2028b"), ("B", "B"), ("True", "True")])
def test_an_answer_is_read_and_its_worked_example_earns_the_reward(tmp_path, answer, text):
    problem = read(tmp_path, {"prompt": "How many?", "answer": answer})[0]
    assert problem.answer == text and "<<" not in problem.worked()
    assert reward_of(problem, "math") == [1.0] and reward_of(problem, "format") == [1.0]


def test_a_final_answer_beside_a_sentence_is_the_answer(tmp_path):
    problem = read(tmp_path, {"prompt": "How many?", "answer": "so it is 4", "final_answer": "4"})[0]
    assert problem.answer == "4"


def test_steps_before_the_mark_are_the_thought(tmp_path):
    answer = "Half is 48/2 = <<48/2=24>>24.\nAll is <<48+24=72>>72.\n#### 72"
    problem = read(tmp_path, {"question": "How many?", "answer": answer})[0]
    parsed = split_completion(problem.worked())
    assert (parsed.thought, parsed.solution) == ("Half is 48/2 = 24.\nAll is 72.", "72")


@pytest.mark.parametrize("prompt", [
    "How many?", " How many?\r\n", [{"role": "user", "content": "How many?"}], {"role": "user", "content": "How many?"},
    [{"role": "user", "content": [{"type": "text", "text": "How many?"}]}], [{"role": "user",
    "content": ["How many?"]}],
    json.dumps([{"role": "user", "content": "How many?"}])])
def test_a_prompt_is_text_or_a_chat_of_one_turn(tmp_path, prompt):
    assert read(tmp_path, {"prompt": prompt, "answer": "1"})[0].question == "How many?"
    assert read(tmp_path, {"question": prompt, "answer": "1", "prompt": None})[0].question == "How many?"


def test_a_system_turn_stands_above_the_question(tmp_path):
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "How many?"}]
    assert read(tmp_path, {"prompt": chat, "answer": "1"})[0].question == "Be short.\n\nHow many?"


# --- tests ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("row", [
    {"tests": list(ASSERTS)}, {"tests": "\n".join(ASSERTS)}, {"tests": json.dumps(ASSERTS)},
    {"tests": "; ".join(ASSERTS)},
    {"tests": [test + "\r\n" for test in ASSERTS], "setup": None}, {"tests": ASSERTS, "setup": ["import math",
    "n = 1"]}])
def test_tests_of_every_form_are_the_same_tests(tmp_path, row):
    problem = read(tmp_path, {**CODE, **row})[0]
    assert problem.tests == ASSERTS and problem.task == "code"
    assert reward_of(problem, "code") == [1.0]


def test_a_text_whose_statements_build_on_each_other_is_one_test(tmp_path):
    text = "from fractions import Fraction as F\nassert add(F(1), F(2)) == F(3)"
    assert read(tmp_path, {**CODE, "tests": text})[0].tests == (text,)


def test_functions_that_are_tests_are_called_and_helpers_stay_with_their_test(tmp_path):
    functions = "def test_sum():\n    assert add(1, 2) == 3\n\ndef test_zero():\n    assert add(0, 0) == 0"
    helper = "def twice(x):\n    return 2 * x"
    steps = [helper, "assert add(1, 1) == twice(1)", ASSERTS[0]]
    called, joined = read(tmp_path, {**CODE, "tests": functions}, {**CODE, "tests": steps})[:2]
    assert called.tests == (f"{functions}\n\ntest_sum()\ntest_zero()",)
    assert joined.tests == (f"{helper}\nassert add(1, 1) == twice(1)", ASSERTS[0])
    assert [reward_of(problem, "code") for problem in (called, joined)] == [[1.0], [1.0]]


def test_published_forms_of_code_tasks_are_read(tmp_path):
    full = {"text": "Write add.", "code": CODE["code"], "task_id": 1, "test_list": ASSERTS, "test_setup_code": "n = 1",
            "challenge_test_list": []}
    sanitized = {"prompt": "Write sum.", "code": CODE["code"], "test_imports": ["import math"], "test_list": ASSERTS}
    human = {"prompt": "def add(a, b):\n", "canonical_solution": "    return a + b\n", "entry_point": "add",
    "test": CHECK}
    first, second, third = read(tmp_path, full, sanitized, human)[:3]
    assert first.question == "Write add.\nThe code must pass this test:\nn = 1\nassert add(1, 2) == 3"
    assert (first.tests, first.setup, first.answer) == (ASSERTS, "n = 1", CODE["code"])
    assert (second.tests, second.setup) == (ASSERTS, "import math")
    assert third.answer == CODE["code"] and third.tests == (CHECK + "\n\ncheck(add)",)
    assert [reward_of(problem, "code") for problem in (first, second)] == [[1.0], [1.0]]


def test_a_question_with_options_asks_for_the_letter(tmp_path):
    published = {"question": "Which?", "choices": ["a whale", "a trout"], "answer": 0, "hint": "Look.", "lecture": "L.",
                 "image": None}
    built = {"prompt": "Which?\n(A) x\n(B) y", "choices": ["x", "y"], "answer_index": 1,
    "answer": "R.\nThe answer is (B)."}
    first, second = read(tmp_path, published, built)[:2]
    assert (first.question, first.answer, first.thought) == ("Look.\nWhich?\n(A) a whale\n(B) a trout", "A", "L.")
    assert second.answer == "B" and reward_of(second, "math") == [1.0]


# --- files ------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "One?", "answer": "1"}, {"prompt": "Two\u2028or\x85so?", "answer": "2"}]
LINES = [json.dumps(row, ensure_ascii=False) for row in ROWS]


@pytest.mark.parametrize("content", [
    "\n".join(LINES), "\ufeff" + "\n".join(LINES), "\r\n".join(LINES) + "\r\n", "\n\n".join(["", *LINES, "", " "]),
    json.dumps(ROWS),
    json.dumps(ROWS, indent=2), "\ufeff" + json.dumps(ROWS, indent=2), json.dumps(dict(enumerate(ROWS))),
    json.dumps(dict(enumerate(ROWS)), indent=1)])
def test_a_file_of_every_form_holds_the_same_problems(tmp_path, content):
    path = tmp_path / "p.json"
    path.write_text(content, encoding="utf-8", newline="")
    assert [(problem.question, problem.answer) for problem in file_source(path).rows] == [
        ("One?", "1"), ("Two\u2028or\x85so?", "2")]


@pytest.mark.parametrize(("content", "told"), [
    (LINES[0] + ",\n" + LINES[1], "line 1 is no JSON record (Extra data at character 34): write one object a line"),
    (LINES[0] + "\n" + LINES[1] + "}", "line 2 is no JSON record"),
    ('[\n{"prompt": "One?"\n"answer": "1"}\n]', "line 3 is no JSON record"),
    ('{"prompt": "One?", "prompt": "Two?", "answer": "1"}', "line 1 is no JSON record (it holds 'prompt' twice)"),
    ('{"1": {},\n"1": {}}', "it holds '1' twice"),
    ('{"prompt": "One?", "answer": "\\ud83d"}', "line 1 is no JSON record"),
    ('"text"', "line 1 is no JSON record (expected an object, got str)"),
    ('{"prompt": "One?", "answer": "1", "split": "train"}\n{"prompt": "Two?", "answer": "2", "split": "test"}',
     "mixes rows of the splits test (1), train (1)"),
    ("", "holds 0 problems"),
    (LINES[0] + "\n" + LINES[0], "holds 1 problems"),
    ("\n".join([*LINES, LINES[0].replace('"1"', '"3"')]), "line 3 asks what line 1 asks and gives another answer")])
def test_a_broken_file_is_refused_by_its_line(tmp_path, content, told):
    path = tmp_path / "p.jsonl"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        file_source(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(("row", "told"), [
    ({"prompt": "p"}, "needs a prompt, and tests or an answer; its fields are prompt"),
    ({"prompt": " ", "answer": "1"}, "needs a prompt"),
    ({"prompt": None, "tests": ["assert 1"]}, "needs a prompt"),
    ({"promt": "p", "answer": "1"}, "rename promt to prompt"),
    ({"instruction": "p", "output": "1"}, "rename instruction to prompt, rename output to answer"),
    ({"prompt": "p", "answer": "1", "test_cases": ["assert f()"]},
    "has the field test_cases, which is not read: rename it to tests"),
    ({"prompt": "p", "tests": ["assert f()"], "solution": "def f(): ..."}, "has the field solution"),
    ({"prompt": "p", "tests": ["assert f()"], "setpu": "n = 1"},
    "has the field setpu, which is not read: rename it to setup"),
    ({"prompt": "p", "question": "q", "answer": "1"}, "holds both a prompt and a question"),
    ({"prompt": "p", "answer": "so it is 4", "final_answer": "5"}, "holds both an answer and a final_answer"),
    ({"prompt": "p", "tests": CHECK}, "tests 1 asserts nothing: it defines, and calls none of it"),
    ({"prompt": "p", "tests": ["assert f()", "import math", "def helper(): ..."]}, "tests 3 asserts nothing"),
    ({"prompt": "p", "tests": "class Test:\n    def test(self):\n        assert f()"}, "tests 1 asserts nothing"),
    ({"prompt": 5, "answer": "1"}, "has neither text nor a chat in its field prompt: it is int"),
    ({"prompt": [], "answer": "1"}, "has a chat of nothing in its field prompt"),
    ({"prompt": ["a", "b"], "answer": "1"}, "neither text nor a chat"),
    ({"prompt": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}], "answer": "1"},
    "a chat of user, assistant"),
    ({"prompt": [{"role": "user", "content": [{"type": "image"}]}], "answer": "1"},
     "has a part in its field prompt that is no text"),
    ({"prompt": "[{'role': 'user', 'content': 'a'}]", "answer": "1"}, "a chat printed as text"),
    ({"prompt": "p", "answer": True}, "has the answer true"),
    ({"prompt": "p", "answer": {"value": 1}}, "has an object in its field answer: give text or a number"),
    ({"prompt": "p", "answer": []}, "an empty list"),
    ({"prompt": "p", "answer": ["1", "2"]}, "a list of 2 different texts"),
    ({"prompt": "p", "answer": float("nan")}, "nan"),
    ({"prompt": "p", "answer": "12 - 3 = 9\n####"}, "ends with ####"),
    ({"prompt": "p", "answer": "<think>9"}, "a reasoning tag"),
    ({"prompt": "p", "answer": "."}, "says nothing"),
    ({"prompt": "p", "tests": {"inputs": ["1"], "outputs": ["2"]}}, "tests is an object of inputs, outputs"),
    ({"prompt": "p", "tests": [{"input": "1", "output": "2"}]}, "tests must be a list of at least 1 text"),
    ({"prompt": "p", "tests": [1]}, "tests must be a list"),
    ({"prompt": "p", "tests": 5}, "tests must be a list"),
    ({"prompt": "p", "tests": ["assert f( == 1"]}, "tests 1 is no Python"),
    ({"prompt": "p", "tests": ["f(1) == 1"]}, "tests 1 asserts nothing"),
    ({"prompt": "p", "tests": "The sum must be right."}, "tests 1 is no Python"),
    ({"prompt": "p", "tests": ["assert f()"], "setup": {"a": 1}}, "setup must be Python text"),
    ({"prompt": "p", "tests": ["assert f()"], "setup": "import"}, "setup is no Python"),
    ({"question": "q", "choices": ["a", "b"], "answer": 2}, "answer_index must be"),
    ({"question": "q", "choices": ["a", "b"], "answer": 1, "image": "i.png"}, "is about an image")])
def test_a_row_without_an_obvious_meaning_is_refused_by_its_line(tmp_path, row, told):
    with pytest.raises(ValueError, match=re.escape(told)) as caught:
        read(tmp_path, OTHER | {"prompt": "First?"}, row)
    assert "problems.jsonl: line 2 " in str(caught.value) and "\n" not in str(caught.value)


# --- reference code ---------------------------------------------------------------------------------------------------


@pytest.mark.skipif(confinement() is not None, reason="no confinement here")
@pytest.mark.parametrize("name", ["code", "answer"])
def test_a_row_whose_own_code_fails_its_tests_is_named(tmp_path, name):
    right = {"prompt": "Write inc.", name: "def inc(a): return a + k", "tests": ["assert inc(1) == 2"], "setup": "k=1"}
    wrong = {**right, name: "def inc(a): return a", "prompt": "Write inc1."}
    with pytest.raises(ValueError, match="the reference code fails its own tests at line 2 .failed: test 1: Assert"):
        read(tmp_path, right, wrong, {**right, name: "", "prompt": "Write inc2."})
    assert len(read(tmp_path, right)) == 2
