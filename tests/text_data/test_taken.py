"""taken: which part of a generated text is its answer, by each way of `--answer_from`."""

from __future__ import annotations

import pytest
from reasoning_gym.utils import extract_answer

from text_data.answers import boxed_answer, marked_answer, tagged_answer
from text_data.taken import is_number, taken_answer, written_answer

WAYS = ("text", "last_number", "tags", "boxed")


@pytest.mark.parametrize(("text", "way", "answer"), [
    ("It is 5.", "text", "It is 5."),
    ("2 + 3 = 5, so it is 5.", "last_number", "5"),
    ("The answer is 1,234 apples.\nQuestion: 7 + 7", "last_number", "1234"),
    ("<answer>5</answer> I am sure.", "last_number", "5"),
    ("First <answer> 4 </answer>, no: <answer>\n5\n</answer>", "tags", "5"),
    (r"so \boxed{4}, no: \boxed{\frac{1}{2}}.", "boxed", r"\frac{1}{2}"),
    (r"\boxed{4} <answer>5</answer>", "tags", "5"),
    (r"\boxed{4} <answer>5</answer>", "boxed", "4"),
])
def test_each_way_takes_its_own_part(text, way, answer):
    assert taken_answer(text, way, numeric=True) == answer


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("text", ["no mark at all", "<answer>5", r"\boxed{5", "<answer> </answer>"])
def test_a_text_in_which_nothing_is_found_is_its_own_answer(way, text):
    if way == "last_number" and "5" in text:
        return
    assert taken_answer(text, way, numeric=True) == text


@pytest.mark.parametrize(("text", "answer"), [
    ("**Paris**.", "Paris"), ("I think: <answer>Paris</answer>", "Paris"), ("Paris\nQuestion: and 3 + 4?", "Paris"),
    ("1 2\n3 4", "1 2\n3 4"),
])
def test_where_no_number_is_asked_for_none_is_looked_for(text, answer):
    assert taken_answer(text, "last_number", numeric=False) == answer


@pytest.mark.parametrize(("gold", "numeric"), [
    ("13", True), ("-4.5", True), ("1/2", True), ("1,234", True), ("Paris", False), ("1 2\n3 4", False),
    ("0101", False), ("5 apples", False), (None, False), ("[1, 2]", False), ("0", True), ("0.5", True),
])
def test_a_gold_answer_is_a_number_or_a_text(gold, numeric):
    assert is_number(gold) is numeric


@pytest.mark.parametrize("text", [
    "a <answer>5</answer> b", "<answer>\n5\n</answer>", "<answer>4</answer> then <answer>5</answer>", "none",
    "<answer>5",
])
def test_tags_are_read_as_reasoning_gym_reads_them(text):
    theirs = extract_answer(text)
    ours = tagged_answer(text)
    assert theirs == (ours.strip() if ours is not None else None)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("gold", ["13", "Paris"])
def test_an_answer_written_for_a_way_is_found_by_it(way, gold):
    assert taken_answer(f"{written_answer(gold, way)}", way, is_number(gold)) == gold


def test_a_box_comes_before_a_tag_where_either_will_do():
    text = r"<answer>5</answer> \boxed{4}"
    assert (boxed_answer(text), tagged_answer(text), marked_answer(text)) == ("4", "5", "4")
    assert marked_answer("<answer>5</answer>") == "5" and marked_answer("5") is None
