"""suite.scoring: what counts as an answer, and the intervals of what is measured."""

from __future__ import annotations

import math
from decimal import Decimal

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from suite.language import language_estimates
from suite.scoring import (
    choose_option,
    corpus_bleu,
    exact,
    rationale_of,
    rouge_l,
    same_number,
)
from text_data.numbers import final_number

# --- the final number

# Characters that neither make a number nor change one.
SAFE = st.characters(exclude_categories=["Nd", "No", "Nl", "Sm", "Sc", "Pd"], exclude_characters="#.,/^*%!(\\{‾")
NUMBERLESS = st.text(SAFE, max_size=20)


@given(st.decimals(-10**9, 10**9, allow_nan=False, places=3), NUMBERLESS, st.sampled_from(["", "$"]), st.booleans(),
       st.sampled_from(["", ".", " dollars", "\n"]), st.booleans())
def test_a_written_number_is_found_whatever_its_dress(number, before, currency, commas, after, marked):
    shown = f"{abs(number):,}" if commas else str(abs(number))
    text = f"{before} {'#### ' if marked else ''}{'-' if number < 0 else ''}{currency}{shown}{after}"
    assert Decimal(final_number(text)) == number and same_number(text, str(number))
    wrong = Decimal(number) + 1
    assert not same_number(text, str(wrong))


def test_no_number_is_never_right():
    assert not same_number("none", "none") and not same_number("", "3") and same_number("12.0", "12")


@pytest.mark.parametrize(("text", "right"), [("19", True), (" 19.\n", True), ("12 + 7 = 19", False), ("190", False)])
def test_exact_is_the_answer_and_nothing_else(text, right):
    assert exact(text, "19") is right


# --- options

CHOICES = ("a solid", "a liquid", "a gas", "Both a solid and a liquid")


@pytest.mark.parametrize(("text", "place"), [
    ("B", 1), ("(C)", 2), ("c)", 2), ("A.", 0), ("B: a liquid", 1), ("The answer is (B).", 1), ("The answer is B", 1),
    ("Answer: C\nBecause it expands.", 2), ("It flows, so (A) is wrong and the answer is (B).", 1),
    ("The answer is a gas.", 2), ("a gas", 2), ("A gas.", 2), ("It is a liquid because it flows.", 1),
    ("The lecture of it.\nThe answer is (D).", 3), ("Both a solid and a liquid", 3), ("**B**", 1), ("(b)", 1),
    ("**Answer:** **C**", 2), ("Option B", 1), ("A force acts on it.", None), ("", None), ("(E)", None), ("Z", None),
    ("It may be a solid or a gas.", None), ("I think (B) it is", 1), ("The answer is clear: (C)", 2), ("a", None),
    ("The correct answer is (B) a liquid. The wrong answer is obvious.", 1), ("B, since it flows", 1),
    ("The answer is B because it flows.", 1), ("The answer is A because it is hard.", 0), ("A lot of it flows", None)])
def test_the_option_is_found(text, place):
    assert choose_option(text, CHOICES) == place


@given(st.lists(st.text("abcdefgh ", min_size=1, max_size=9).filter(str.strip), min_size=2, max_size=5,
                unique_by=lambda text: " ".join(text.split())), st.data())
def test_the_letter_names_the_option_whatever_the_options_say(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    letter = "ABCDE"[place]
    for text in (f"({letter})", f"The answer is ({letter}).", f"{choices[0]} it is not.\nThe answer is ({letter})."):
        assert choose_option(text, choices) == place


@given(st.lists(st.text("xyz", min_size=2, max_size=4), min_size=2, max_size=5, unique=True), st.data())
def test_an_option_is_named_by_its_words(choices, data):
    place = data.draw(st.integers(0, len(choices) - 1))
    for text in (choices[place], f"It is {choices[place]}.", f"The answer is {choices[place]}, is it not?"):
        assert choose_option(text, choices) == place


@given(st.text(max_size=50))
def test_any_text_gives_an_option_or_none(text):
    assert choose_option(text, CHOICES) in (None, 0, 1, 2, 3)


def test_options_of_numbers_and_signs():
    assert choose_option("1/4", ("1/4", "0/4", "4/4")) == 0
    assert choose_option("The answer is 4/4.", ("1/4", "0/4", "4/4")) == 2
    assert choose_option("it is -3 degrees", ("-3 degrees", "13 degrees")) == 0


def test_options_that_differ_in_case_alone_and_letters_before_words():
    choices = ("Dear ms. Allen,", "Dear Ms. Allen,")
    assert [choose_option(choice, choices) for choice in choices] == [0, 1]
    assert choose_option("The answer is Dear Ms. Allen,", choices) == 1
    assert choose_option("Answer: B. BECAUSE: is it inside? The answer is yes.", ("yes", "no")) == 1
    assert choose_option("nothing", ("no", "yes")) is None


def test_the_rationale_is_what_is_said_beside_the_option():
    assert rationale_of("Water flows. It is wet.\nThe answer is (B).") == "Water flows. It is wet."
    assert rationale_of("B\nBecause: water flows.") == "water flows."
    assert rationale_of("The answer is (B).") == "" == rationale_of("(B)")


# --- estimates


def test_perplexity_and_bits_of_a_uniform_model():
    documents = [(-math.log(8) * tokens, tokens, 2 * tokens) for tokens in (3, 10, 7)]
    found = language_estimates(documents, 0)
    assert found["perplexity"].value == pytest.approx(8) and found["perplexity"].n == 20
    assert found["bits_per_byte"].value == pytest.approx(1.5) and found["bits_per_byte"].n == 40
    assert found["perplexity"].low == pytest.approx(8) == found["perplexity"].high
    uneven = language_estimates([(-5.0, 3, 9), (-40.0, 10, 30)], 0)["perplexity"]
    assert uneven.value == pytest.approx(math.exp(45 / 13)) and uneven.low < uneven.value < uneven.high
    assert language_estimates([(-1e9, 1, 1)], 0)["perplexity"].value == math.inf


TEXTS = ["the water is warm and it flows down", "a gas fills its whole container", "", "it is a solid"]
GOLDS = ["the water is warm so it flows down", "a gas fills all of its container", "it melts", "it is a solid rock"]


def test_bleu_is_that_of_the_whole_corpus():
    from sacrebleu.metrics import BLEU

    found = corpus_bleu(TEXTS, GOLDS, 0)
    assert found.value == pytest.approx(BLEU().corpus_score(TEXTS, [GOLDS]).score) and found.n == 4
    assert found.low < found.value < found.high and corpus_bleu(GOLDS, GOLDS, 0).value == pytest.approx(100)


def test_rouge_l_is_the_mean_longest_common_subsequence():
    def f1(text: str, gold: str) -> float:
        a, b = text.split(), gold.split()
        longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
        for i, x in enumerate(a, 1):
            for j, y in enumerate(b, 1):
                longest[i][j] = longest[i - 1][j - 1] + 1 if x == y else max(longest[i - 1][j], longest[i][j - 1])
        return 2 * longest[-1][-1] / (len(a) + len(b))

    found = rouge_l(TEXTS, GOLDS, 0)
    assert found.value == pytest.approx(np.mean([f1(*pair) for pair in zip(TEXTS, GOLDS, strict=True)]))
    assert found.n == 4 and found.low < found.value < found.high
