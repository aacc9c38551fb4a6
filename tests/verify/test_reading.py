"""reading: a text is judged as it stands, and by the answer taken out of it."""

from __future__ import annotations

import pytest

from reasoning_gym_wrapper import Task
from verify.judge import Verdict
from verify.reading import read_answer, verdict_by


class Judge:
    """A verifier of the answer 5; a text that holds it is worth a quarter."""

    def __init__(self):
        self.heard: list[str] = []

    def __call__(self, text: str) -> Verdict:
        self.heard.append(text)
        return Verdict(1.0 if text == "5" else 0.25 * ("5" in text))


@pytest.mark.parametrize(("text", "way", "score", "strict", "extracted"), [
    ("5", "text", 1.0, True, True),
    ("5", "tags", 1.0, True, True),
    ("It is 5", "text", 0.25, False, True),
    ("It is 5", "last_number", 1.0, False, True),
    ("It is 5", "tags", 0.25, False, False),
    ("<answer>5</answer> not 6", "tags", 1.0, False, True),
    ("<answer>6</answer> not 5", "tags", 0.0, False, False),
    (r"\boxed{5}!", "boxed", 1.0, False, True),
])
def test_both_readings_are_kept_and_the_way_chooses_the_verdict(text, way, score, strict, extracted):
    reading = read_answer(Judge(), text, "5", way)
    assert (reading.verdict.score, reading.strict, reading.extracted) == (score, strict, extracted)
    assert verdict_by(Judge(), text, "5", way) == reading.verdict


def test_nothing_is_judged_twice_that_need_not_be():
    judge = Judge()
    read_answer(judge, "5", "5", "last_number")
    read_answer(judge, "6", "5", "text")
    assert judge.heard == ["5", "6"]
    verdict_by(judge, "It is 5", "5", "text")
    assert judge.heard == ["5", "6", "It is 5"]


def test_a_real_task_judges_what_was_taken():
    example = next(Task("chain_sum").items(3))[1]
    reading = read_answer(example.verify, f"Let me see. The answer is {example.target}.", example.target, "text")
    assert not reading.strict and reading.extracted and not reading.verdict.solved
