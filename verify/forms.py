"""The forms answers are written in: words, rows, numbers, lists, JSON. Nothing here evaluates text."""

from __future__ import annotations

import json
import re
from decimal import Decimal
from fractions import Fraction
from typing import Any

from engine.files import parse_json

# A number as people and programs write it: a sign, commas between thousands, a point, an exponent.
UNSIGNED = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)(?:\.[0-9]*)?|\.[0-9]+"
NUMBER = re.compile(rf"[+-]?\s?(?:{UNSIGNED})(?:[eE][+-]?[0-9]{{1,3}})?", re.A)
LONGEST_NUMBER = 2_000  # characters
QUOTES = "'\""


def words(text: str) -> list[str]:
    """The words of a text, whatever whitespace is between them."""
    return text.split()


def rows(text: str) -> list[list[str]]:
    """The words of each line that has some."""
    return [line.split() for line in text.splitlines() if line.strip()]


def lines(text: str) -> list[str]:
    """The lines without the whitespace at their ends."""
    return [line.rstrip() for line in text.strip().splitlines()]


def number(text: str) -> Decimal:
    """The number that the whole text is. Raises ValueError where it is none, as NaN and infinity are not."""
    text = text.strip().replace("\u2212", "-")
    if len(text) > LONGEST_NUMBER or not NUMBER.fullmatch(text):
        raise ValueError("not a number")
    return Decimal(text.replace(",", "").replace(" ", ""))


def matched(form: re.Pattern[str], text: str) -> re.Match[str]:
    """The match of the whole text. Raises ValueError where it has another form."""
    match = form.fullmatch(text)
    if match is None:
        raise ValueError("another form")
    return match


def exponent_of(value: Decimal) -> int:
    """The power of ten of the last digit written. Raises ValueError for NaN and infinity."""
    exponent = value.as_tuple().exponent
    if not isinstance(exponent, int):
        raise ValueError("not a finite number")
    return exponent


def shortened(value: Decimal) -> tuple[str, int]:
    """(significant digits, exponent) of a number without the zeros behind it.

    Unlike `Decimal.normalize` it rounds nothing: tasks set the precision of the whole process.
    """
    every = "".join(map(str, value.as_tuple().digits))
    digits = every.rstrip("0")
    return digits, exponent_of(value) + len(every) - len(digits)


def whole(text: str) -> int:
    """The integer that the whole text is, commas between thousands allowed. Raises ValueError."""
    value = number(text)
    if value != value.to_integral_value():
        raise ValueError("not an integer")
    return int(value)


def fraction(text: str) -> Fraction:
    """The exact value of `7/64` or of a number. Raises ValueError, and ZeroDivisionError for a division by 0."""
    over, slash, under = text.partition("/")
    value = Fraction(number(over))
    return value / Fraction(number(under)) if slash else value


def items(text: str) -> list[str]:
    """The items of a list in square brackets, without their quotes: `['1', '2']`. Raises ValueError."""
    text = text.strip()
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError("not a list")

    inside = text[1:-1].strip()
    if not inside:
        return []
    return [item.strip().strip(QUOTES) for item in inside.split(",")]


def parts(text: str, mark: str = ",") -> list[str]:
    """What stands between marks, without the whitespace around it."""
    return [part.strip() for part in text.split(mark)]


def from_json(text: str) -> Any:
    """The value of a whole JSON text. Raises ValueError, as `parse_json`: also for a key that stands twice."""
    return parse_json(text, strict=True)


def same_json(one: Any, other: Any) -> bool:
    """Whether two JSON values are equal, True and 1 apart."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def is_text_list(value: Any) -> bool:
    """Whether a JSON value is a list of strings."""
    return isinstance(value, list) and all(isinstance(part, str) for part in value)
