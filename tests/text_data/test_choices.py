"""text_data.choices: which option a text names."""

from __future__ import annotations

import pytest

from text_data.choices import choose_option, option_letter

CHOICES = ("a solid", "a liquid", "a gas", "Both a solid and a liquid")
# How a model names the second option without its words.
NAMED = [
    r"\boxed{B}", r"\boxed{\text{B}}", r"$\boxed{(B)}$", "<answer>B</answer>", "<answer> (B) </answer>", "[[B]]",
    "(B)", "B.", "B)",
    "B", "**B**", '"B"', "`B`", "{B}", "[B]", "Answer: B", "**Answer: B**", "Ans: B", "Answer:\nB",
    "The answer is B.", "Option B",
    "The answer is option B", "The correct option is (B)", "Final answer: **B**",
    r"The final answer is $\boxed{\text{B}}$.",
    "The answer is B because A is wrong", "The answer is (B) and not (A)", "B, because it flows", "B, I think",
    "B\n\nQuestion: the next\nAnswer: C", "The answer is A. No, the answer is B.", r"\textbf{B}",
]  # fmt: skip
UNCLEAR = [
    "B or C", "A and B", "(A) or (B)", "A/B", "A, B", "Answer: (A) or (B)", "The answer is B or C", r"\boxed{B or C}",
    "not B",
    "Not (B)", "The answer is not B", "B is wrong", "(A) is wrong, (B) is right", "", "It depends.",
]  # fmt: skip


@pytest.mark.parametrize("text", NAMED)
def test_a_letter_is_found_with_and_without_the_options(text):
    assert choose_option(text, CHOICES) == 1
    assert option_letter(text) == "B"


@pytest.mark.parametrize("text", UNCLEAR)
def test_an_answer_that_names_no_one_option_names_none(text):
    assert choose_option(text, CHOICES) is None
    assert option_letter(text) is None


@pytest.mark.parametrize(("text", "place"), [
    ("B) a liquid", 1), ("(B) a liquid", 1), ("**B. a liquid**", 1), ("The answer is: B) a liquid", 1),
    (r"\boxed{a liquid}", 1),
    ("<answer>a gas</answer>", 2), ("B, a liquid", 1), (r"\boxed{E}", None), ("Answer: E", None), (r"\boxed{b}", 1),
    ("A", 0)])
def test_words_of_an_option_name_it(text, place):
    assert choose_option(text, CHOICES) == place


@pytest.mark.parametrize("piece", ["answer is ", "\\boxed{", "<answer>", "(B) ", "B or ", "\nQ: "])
def test_a_long_text_is_read_in_bounded_time(piece):
    assert choose_option(piece * 20_000, CHOICES) in (None, 1)
