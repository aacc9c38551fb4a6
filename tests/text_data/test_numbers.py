"""text_data.numbers: the final number of a worked answer; how rewards read numbers is tested with the rewards."""

from __future__ import annotations

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from text_data.numbers import final_number

SAFE = st.characters(exclude_categories=["Nd", "No", "Nl"], exclude_characters="#-\u2212.,$")
NUMBERLESS = st.text(SAFE, max_size=20)


@pytest.mark.parametrize(("text", "number"), [
    ("#### 72", "72"), ("#### $1,234.50.", "1234.5"), ("so 3 + 4 = 7", "7"), ("12.0", "12"), ("12.", "12"),
    ("It costs $-5", "-5"), ("-$5", "-5"), ("\u22127", "-7"), ("10-5", "5"), ("pages 3-4", "4"), ("x = -3", "-3"),
    (".50", "0.5"), ("-0", "0"), ("007", "7"), ("1,234,567", "1234567"), ("1, 2, 3", "3"), ("50%", "50"),
    ("#### 5\n\nNext: 1 + 1\n#### 2", "5"), ("12 is it ####", "12"), ("7 #### none", "7"), ("1,2345", "2345"),
    ("**18**", "18"), ("", None), ("no number", None), ("\u0663", None), ("(-4)", "-4"), ("is 5.", "5"),
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
    assert found is None or (Decimal(found).is_finite() and final_number(found) == found)
