"""Verifiers of own data: the built-in ones, patterns, the user's own functions."""

from __future__ import annotations

import pytest

from own_tasks.trusted import type_in
from own_tasks.verifiers import verifier_of


@pytest.mark.parametrize(("verifier", "gold", "right", "wrong"), [
    ("exact", "Paris ", ["Paris", " Paris\n"], ["paris", "Paris.", "", "in Paris"]),
    ("number", "1,234", ["1234", "The answer is 1234.", "1234.0", "$1,234"], ["12", "1234 or 5", "", "many"]),
    ("number", "12 + 3 = 15 #### 15", ["15", "12 + 3 = 15\n#### 15"], ["12 + 3 = 15", "#### 12"]),
    ("choice", "B", ["B", "(B)", "b", "The answer is B.", "B) Rome"], ["A", "A or B", "", "Rome"]),
    ("choice", "(B) Rome", ["B"], ["C"]),
    (r"regex:<a>(.*?)</a>", "so <a>7</a>", ["<a> 7 </a>", "<a>8</a> no, <a>7</a>"], ["7", "<a>8</a>"]),
    (r"regex:-?\d+$", "it is 7", ["7", "six and 7"], ["7 x", "8"]),
])
def test_a_verifier_takes_the_right_answers_alone(verifier, gold, right, wrong):
    judge, entry = verifier_of(verifier), {"question": "?", "answer": gold, "metadata": {}}
    assert [judge.score_answer(text, entry) for text in [gold, *right]] == [1.0] * (len(right) + 1)
    assert [judge.score_answer(text, entry) for text in wrong] == [0.0] * len(wrong)


@pytest.fixture
def module(tmp_path, monkeypatch):
    (tmp_path / "judges_here.py").write_text(
        "def half(answer, entry): return 0.5 + 0.5 * (answer == entry['answer'])\n"
        "def nothing(answer, entry): return None\n"
        "five = 5\n", encoding="utf-8")
    (tmp_path / "broken_here.py").write_text("1 / 0\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", ["", *__import__("sys").path])
    type_in([f"{name}" for name in ("judges_here:half", "judges_here:nothing", "judges_here:other", "judges_here:five",
                                    "no_such_module:f", "broken_here:f")])


def test_a_function_of_the_users_judges(module):
    judge = verifier_of("judges_here:half")
    assert judge.score_answer("a", {"answer": "a"}) == 1.0 and judge.score_answer("b", {"answer": "a"}) == 0.5
    with pytest.raises(TypeError, match="it returned NoneType, expected a number"):
        verifier_of("judges_here:nothing").score_answer("a", {"answer": "a"})


@pytest.mark.parametrize(("text", "told"), [
    ("regex:(", "is no regular expression: missing"),
    ("exactly", "is not legal: expected exact, number, choice, regex:PATTERN or PKG.MOD:FUNCTION"),
    ("no_such_module:f", "cannot be imported (ModuleNotFoundError"),
    ("broken_here:f", "cannot be imported (ZeroDivisionError: division by zero)"),
    ("judges_here:other", "judges_here has no function of the name other"),
    ("judges_here:five", "judges_here has int, no function, of the name five"),
    ("os:system", "names a module of Python itself"),
    ("builtins:exec", "names a module of Python itself"),
])
def test_what_is_no_verifier_is_one_line(module, text, told):
    with pytest.raises(ValueError) as error:
        verifier_of(text)
    assert told in str(error.value) and "\n" not in str(error.value)
