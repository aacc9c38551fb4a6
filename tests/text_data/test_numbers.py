"""text_data.numbers: the final number of a worked answer, and the one number of a short one."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text_data.numbers import final_number, numbers, one_number

# Characters that neither make a number nor change one.
SAFE = st.characters(exclude_categories=["Nd", "No", "Nl", "Sm", "Sc", "Pd"], exclude_characters="#.,/^*%!(\\{‾")
NUMBERLESS = st.text(SAFE, max_size=20)


@pytest.mark.parametrize(("text", "number"), [
    ("#### 72", "72"), ("#### $1,234.50.", "1234.5"), ("so 3 + 4 = 7", "7"), ("12.0", "12"), ("12.", "12"),
    ("It costs $-5", "-5"), ("-$5", "-5"), ("\u22127", "-7"), ("10-5", "5"), ("pages 3-4", "4"), ("x = -3", "-3"),
    (".50", "0.5"), ("-0", "0"), ("007", "7"), ("1,234,567", "1234567"), ("1, 2, 3", "3"), ("50%", "50"),
    ("#### 5\n\nNext: 1 + 1\n#### 2", "5"), ("12 is it ####", "12"), ("7 #### none", "7"), ("1,2345", "2345"),
    ("**18**", "18"), ("", None), ("no number", None), ("\u0663", "3"), ("(-4)", "-4"), ("is 5.", "5"),
    ("3.5.", "3.5"), ("$ 20", "20"), ("A1-2", "2"), ("2^-3", "-3")])
def test_the_final_number(text, number):
    assert final_number(text) == number


@given(st.integers(0, 10**6), st.integers(0, 10**6), NUMBERLESS)
def test_the_marked_number_wins_else_the_last(first, last, between):
    assert final_number(f"{last} #### {first} {between} {last}") == str(first)
    assert final_number(f"{first} {between} {last}") == str(last)


@given(st.text(max_size=60))
def test_any_text_gives_plain_digits_or_nothing(text):
    found = final_number(text)
    assert found is None or (Fraction(found) is not None and final_number(found) == found)


# How the same number may be written: everywhere the same, whoever reads it.
SAME = [
    *[(text, "70000") for text in ("70,000", "70{,}000", r"70\,000", r"70,\!000", r"\$70{,}000", "70\u202f000",
    "70\u00a0000")],
    *[(text, "70000") for text in ("70\u2009000", "70 000", "70'000", "70_000", r"$70\;000$", "7e4", "7 x 10^4")],
    *[(text, "-5") for text in ("-\u20ac5", "- $5", "$ - 5", "\u20ac-5", "\u22125", "\u20135", "\u2013 5", "minus 5",
    "-(5)")],
    *[(text, "-5") for text in ("- 5", "is - 5", "x = -5", r"\(-5\)", "$-5$", "-5.", "-5 km", "Answer: - 5",
    "negative $5")],
    *[(text, "5") for text in ("(5)", "+5", "5.", "**5**", "$5", "5 \u20ac", "USD 5", "5 o'clock", "US$5", "5th",
    "\uff15",
    "\u0665", "5\u00b0")],
    *[(text, "5") for text in (r"\boxed{5}", "<answer>5</answer>", r"5^{\circ}", "5 m\u00b2", "5 cm^2",
    r"5 \text{ km}", "5kg", "5 %")],
    *[(text, "0.5") for text in ("1/2", ".5", "0.50", r"\frac12", r"\dfrac{1}{2}", "\u00bd", "5e-1", "1 / 2")],
    *[(text, "2.5") for text in ("2 1/2", "2\u00bd", r"2\frac{1}{2}", "2 and 1/2", "5/2")],
    *[("1.234,56", "1234.56"), ("1.234.567", "1234567"), ("1,00,000", "100000"), ("70.000", "70"),
    ("1 234 567", "1234567")],
]


@pytest.mark.parametrize(("text", "number"), SAME)
def test_a_number_is_read_however_it_is_written(text, number):
    assert final_number(f"#### {text}") == number
    assert one_number(text).value == Fraction(number)
    assert [each.value for each in numbers(text.replace("70 000", "70000").replace("1 234 567",
    number))] == [Fraction(number)]


@pytest.mark.parametrize(("text", "number"), [
    ("The answer is 18 dollars.\n\nQ: another 5", "18"), ("#### 10-5 = 5", "5"), ("#### 5 + 3 = 8", "8"),
    ("#### 18 (x = 3)", "18"), ("####\n18", "18"), ("##### 18", "18"), ("### 18 #### 20", "20"),
    ("#### Answer\nQ1: 18", "18"),
    (r"so \boxed{18}. It took 3 steps", "18"), ("<answer>18</answer> in 3 steps", "18"), ("#### 1/3", "1/3"),
    ("The answer is 18, not 19.", "18"), ("The answer is 18 rather than 19", "18"),
    ("The answer is 18<|im_end|> 19", "18"),
    ("The answer is 18 because 3 * 6 is that.", "18"), ("The answer is 3 + 4 = 7", "7"),
    ("The answer is 5. No: the answer is 6.", "6"),
    ("Steps:\n- 3 apples\n- 4 pears", "4"), ("Q: what is 5?\nA: 6\nQ: more 7", "6"), ("#### -\u00a35", "-5"),
    ("9 - 4 - 2", "2"),
    ("It is 5!", "5"), ("he has 5 million", "5"), ("#### 5 squared", None), ("#### sqrt(9)", None),
    ("#### 10\u00b2", None),
    ("half of 10", None), ("it is not 5", None), ("3 / 0", None), ("on 10/12/2024", None), ("#### \u00b2", None),
    ("Mix 3 250 ml bottles", "250"), ("#### 70 000", "70000"), ("7" * 401, None)])
def test_where_the_final_number_stands(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize("text", [
    "5!", "5th root", "5 squared", "5 cubed", "5M", "5k", "5 million", "5 dozen", "sqrt(9)", r"\sqrt{9}", "\u221a9",
    "half of 10",
    "twice 5",
    "not 5", "it isn't 5", "5 is wrong", "5-6", "5\u20136", "5 or 6", "5 to 6", "between 5 and 6", "x=5 y=6", "5, 6",
    "1,5", "5:30",
    "10\u00b2", "10^2", "5**2", "5x", "5 x", "x5", "5i", "5(x+1)", "f(5)", r"\log 5", "|5|", "\u00b15", r"\pm 5",
    "x < 5", "x <= 5",
    "more than 5", "at least 5", "5 or more", "5+", "5...", "0.333\u2026", "5/0", "10/12/2024", "5 and a half",
    "5 thirds", "0x10", "5 halves", "5 tens", "5\u2030", "5 plus", "anything but 5", "5 below zero", "5_x",
    "1e400", "COVID-19", "Total - 5", "3 + 2 = 5", "3 = 2", "x = 5, y = 5", "zero", "", "1" * 401, "no 5", "5 \u03c0",
    "5/x"])
def test_what_may_be_another_number_is_not_read_as_one(text):
    assert one_number(text) is None


@pytest.mark.parametrize("text", ["5 = 5", "10/2 = 5", "x = 10/2 = 5", "5 = x"])
def test_both_sides_of_an_equation_may_say_the_same(text):
    assert one_number(text).value == 5
