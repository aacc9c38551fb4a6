"""Numbers in running text: the one place that knows how a number, its sign and its separators are written.

`readings` finds every number and says what is doubtful about it. Three readers stand on it: `numbers` gives all of
them, for what a prompt mentions; `one_number` the single one of a short answer, for rewards that a model tries to
cheat; `final_number` that of a worked answer, for benchmarks with one gold number. All are exact, without floating
point, and linear in the text.

A comma between digits separates thousands (`1,234`, also `1,00,000`) or two numbers (`1,5`); it is never a decimal
comma, but for the one form that has no other meaning, `1.234,56`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from text_data.answers import MARK, before_next_question, marked_answer
from text_data.notation import (
    ALTERED_AFTER,
    ALTERED_BEFORE,
    DENIED,
    DIGITS,
    DOUBTFUL_AFTER,
    DOUBTFUL_BEFORE,
    FRACTION_BAR,
    MIXED_GAP,
    NUMBER,
    PERCENT,
    is_unit,
    minus_before,
    plain_text,
)

__all__ = ["DIGITS", "LONGEST", "Number", "Reading", "final_number", "numbers", "one_number", "readings", "value_of"]

LONGEST = 20_000  # characters of a text that are read
NEAR = 40  # characters on either side of a number that may change it
ANNOUNCED = 300  # characters behind `answer is` that are read
TRIES = 20  # announcements that are looked at, from the last

# What announces the number of a worked answer, and what ends the announced part.
_ANNOUNCED = re.compile(r"\banswer\s*(?:is|would be|should be|[:=])\s*[:=]?", re.I)
_ANNOUNCED_END = re.compile(
    r"\n|[.!?;](?=\s|\Z)|\(|\b(?:because|since|where|as)\b|(?<=\d),?\s(?:and\s)?(?:not|rather than|instead of)\b", re.I
)
_EQUALS = re.compile(r"(?<![<>!=])=(?!=)")
# What stands between the first number of a line and the equals sign behind which its value follows.
_EXPRESSION = re.compile(r"[^,;()\n]{0,200}=")


@dataclass(frozen=True)
class Number:
    """A number of a text: its value as written, and whether a percent sign follows it (12% is not 12, nor 0.12)."""

    value: Fraction
    percent: bool = False


@dataclass(frozen=True)
class Reading:
    """A number where it stands.

    Args:
        number: None for a division by 0.
        text: the text of `plain_text` in which it stands.
        start, end: its place there, without its sign and with its percent sign.
    """

    number: Number | None
    text: str
    start: int
    end: int

    @property
    def is_altered(self) -> bool:
        """Whether what stands at it makes another number of it: a root, a power, `half of`, `not`."""
        before = self.text[max(self.start - NEAR, 0) : self.start]
        after = self.text[self.end : self.end + NEAR]
        if self.number is None:
            return True
        return ALTERED_BEFORE.search(before) is not None or ALTERED_AFTER.match(after) is not None

    @property
    def is_doubtful(self) -> bool:
        """Whether what stands at it may do so: `5!`, `5 million`, `5x`, `more than 5`, `5 or more`."""
        before = self.text[max(self.start - NEAR, 0) : self.start]
        after = self.text[self.end : self.end + NEAR]
        if minus_before(self.text, self.start).doubtful or not is_unit(after):
            return True
        return DOUBTFUL_BEFORE.search(before) is not None or DOUBTFUL_AFTER.match(after) is not None


def value_of(digits: str) -> Fraction:
    """The exact value of digits as written, without a sign: `1,234.5` is 2469/2."""
    return Fraction(digits.replace(",", ""))


# --- all numbers ------------------------------------------------------------------------------------------------------


def readings(text: str) -> list[Reading]:
    """Every number of a text of `plain_text`, in order. A fraction (1/2, 1 1/2) is one number."""
    matches = list(NUMBER.finditer(text))
    read = []
    place = 0
    while place < len(matches):
        value, length = _fraction(text, matches[place : place + 3])
        start = matches[place].start()
        end = matches[place + length - 1].end()
        place += length
        read.append(_reading(text, value, start, end))
    return read


def _reading(text: str, value: Fraction | None, start: int, end: int) -> Reading:
    """The number between two places, with its sign and its percent sign."""
    if value is None:
        return Reading(None, text, start, end)
    if minus_before(text, start).negative:
        value = -value

    percent = PERCENT.match(text, end)
    if percent:
        end = percent.end()
    return Reading(Number(value, percent is not None), text, start, end)


def _fraction(text: str, matches: Sequence[re.Match[str]]) -> tuple[Fraction | None, int]:
    """(value, matches it takes) of the number that begins with the first of up to three matches; None: n / 0."""
    value = value_of(matches[0][0])
    gaps = [text[a.end() : b.start()] for a, b in pairwise(matches)]

    # Three parts of slashes are a date.
    if gaps and FRACTION_BAR.fullmatch(gaps[0]):
        if len(gaps) == 2 and FRACTION_BAR.fullmatch(gaps[1]):
            return None, 3
        divisor = value_of(matches[1][0])
        return (value / divisor if divisor else None), 2

    # A whole number before a proper fraction.
    if len(gaps) == 2 and MIXED_GAP.fullmatch(gaps[0]) and FRACTION_BAR.fullmatch(gaps[1]):
        part = value_of(matches[1][0])
        divisor = value_of(matches[2][0])
        if value.denominator == 1 and part < divisor:
            return value + part / divisor, 3
    return value, 1


def numbers(text: str) -> list[Number]:
    """Every number of the first `LONGEST` characters, in order; a division by 0 is none."""
    read = readings(plain_text(text[:LONGEST]))
    return [reading.number for reading in read if reading.number is not None]


# --- the one number of a short answer ---------------------------------------------------------------------------------


def one_number(text: str) -> Number | None:
    r"""The number that a short answer gives; None where it gives none, several, or one that something may change.

    Units, currency, words around it, a box and Markdown do not matter. `x = 5` gives 5, and so does `10/2 = 5`, whose
    sides agree; `3 + 2 = 5`, `5!`, `5 million`, `more than 5` and `not 5` give none.
    """
    marked = marked_answer(text[:LONGEST])
    plain = plain_text(text[:LONGEST] if marked is None else marked, spaces_group=True)
    if DENIED.search(plain):
        return None

    # Both sides of an equals sign must say the same; a name may stand before it.
    parts = _EQUALS.split(plain)
    sides = [readings(part) for part in parts]
    read = [reading for side in sides for reading in side]
    if not read or any(reading.is_altered or reading.is_doubtful for reading in read):
        return None
    if len(read) > 1:
        lettered = any(re.search(r"[A-Za-z]", part) for part in parts[1:])
        if lettered or any(len(side) > 1 for side in sides) or len({reading.number for reading in read}) > 1:
            return None
    return read[0].number


# --- the final number of a worked answer ------------------------------------------------------------------------------


def final_number(text: str) -> str | None:
    """The final number of a worked answer in plain digits, such as `-1234.5` or `1/3`; None where there is none.

    In this order: the number behind the first `####` (GSM8K's mark); that of the last box or answer tag; that of the
    last `answer is` or `answer:`; the last number of the text. A question that the model goes on with does not count,
    and a number that a root, a power, `half of` or `not` makes another one is none. Percent signs and units are
    dropped; a hyphen after a digit or letter is no sign.
    """
    before, mark, behind = text.partition(MARK)
    if mark:
        reading = _first_of_line(behind[:LONGEST])
        if reading is not None:
            return _digits(reading)

    # A text that is cut keeps its end.
    text = before_next_question(text)[-LONGEST:]
    marked = marked_answer(text)
    for part, place in ((marked, -1), (_announced(text), -1), (text, -1)):
        read = readings(plain_text(part, spaces_group=part is marked)) if part else []
        if read:
            return _digits(read[place])
    return None


def _first_of_line(text: str) -> Reading | None:
    """The first number of the text; where it begins an equation on its line, the number behind the equals sign."""
    plain = plain_text(text, spaces_group=True)
    read = readings(plain)
    if not read:
        return None

    # `10-5 = 5`: the last equals sign of the line counts.
    place = read[0].start
    while match := _EXPRESSION.match(plain, place):
        place = match.end()
    line_end = plain.find("\n", place)
    for reading in read:
        if reading.start >= place and (line_end < 0 or reading.start < line_end):
            return reading
    return read[0]


def _announced(text: str) -> str | None:
    """What the last announcement with a number in it announces, up to the end of its sentence; None: there is none."""
    for match in reversed(list(_ANNOUNCED.finditer(text))[-TRIES:]):
        part = _ANNOUNCED_END.split(text[match.end() : match.end() + ANNOUNCED].lstrip(), maxsplit=1)[0]
        if NUMBER.search(plain_text(part)):
            return part
    return None


def _digits(reading: Reading) -> str | None:
    """The number in plain digits; None where something made another number of it."""
    if reading.number is None or reading.is_altered:
        return None

    # Powers of 2 and 5 alone make a decimal that ends.
    value = reading.number.value
    rest = value.denominator
    places = 0
    for prime in (2, 5):
        count = 0
        while rest % prime == 0:
            rest //= prime
            count += 1
        places = max(places, count)
    if rest != 1:
        return f"{value.numerator}/{value.denominator}"

    digits = str(abs(value.numerator) * 10**places // value.denominator).rjust(places + 1, "0")
    whole = digits[: len(digits) - places]
    part = digits[len(digits) - places :]
    sign = "-" if value < 0 else ""
    return f"{sign}{whole}.{part}" if part else sign + whole
