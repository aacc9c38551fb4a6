"""Numbers in running text: the one place that knows how a number, its sign and its separators are written.

Two readers share it. `numbers` reads every number of a text as an exact fraction, for rewards that a model tries to
cheat. `final_number` reads the last number of a worked answer as plain digits, for benchmarks with one gold number.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

LONGEST = 20_000  # characters of a text that `numbers` reads

# A number without its sign, in time linear in the text: the counts of digits and groups are bounded.
DIGITS = r"(?:\d{1,3}(?:,\d{3}){1,12}(?!\d|,\d)|\d{1,400})(?:\.\d{1,400})?|\.\d{1,400}"


@dataclass(frozen=True)
class Notation:
    """How numbers are written in one kind of text.

    unsigned: matches a number without its sign.
    sign: matches at the end of the text before a number where it has a sign; one that begins with a plus is positive.
    span: characters before a number in which all of its sign stands.
    """

    unsigned: re.Pattern[str]
    sign: re.Pattern[str]
    span: int

    def is_negative(self, text: str, start: int) -> bool:
        """Whether a minus sign belongs to the number that begins at `start`."""
        sign = self.sign.search(text[max(start - self.span, 0) : start])
        return sign is not None and not sign[0].startswith("+")


# Prose with formulas: exponents count, a sign may be a word or stand apart, letters before a number belong to it.
PROSE = Notation(
    unsigned=re.compile(rf"(?<![A-Za-z_])(?:{DIGITS})(?:[eE][-+]?\d{{1,2}}(?!\w))?", re.A),
    sign=re.compile(r"(?<![\w)])-\s{0,2}\$?\s?\Z|\$-\Z|\b(?:minus|negative)\s{1,2}\$?\Z", re.I),
    span=12,
)

# The end of a worked answer: numbers of any length, a sign on either side of a dollar sign. Where both sides have one,
# the first counts. Behind one of these characters a hyphen or a plus is no sign: `10-5` ends in 5.
_NO_SIGN_BEHIND = r"[0-9A-Za-z.)\]%]"
ANSWER = Notation(
    unsigned=re.compile(r"(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![0-9])\.[0-9]+"),
    sign=re.compile(rf"(?:(?<!{_NO_SIGN_BEHIND})[-\u2212+](?:\$ ?[-\u2212]?)?|\$ ?[-\u2212])\Z"),
    span=5,
)

# What makes another number of the one it stands at: roots, powers, fractions as one character, words of size.
_CHANGED = re.compile(
    r"[√∛]|\\sqrt|[\d}][⁰¹²³⁴-⁹½⅓⅔¼¾]|\d\s?(?:k|(?:hundred|thousand|million|billion|trillion|dozen)s?)\b", re.I
)
_LATEX_FRACTION = re.compile(r"\\[dt]?frac\s?\{([^{}]{1,40})\}\s?\{([^{}]{1,40})\}")
_LATEX = re.compile(r"\\[A-Za-z]+|\\.|[{}]")
_ASCII = str.maketrans({"−": "-", "–": "-", "×": "*", "·": "*", "÷": "/", "⁄": "/"} | dict.fromkeys("‐‑‒﹣－", "-"))
_MARK = "####"  # GSM8K writes its answer behind it


@dataclass(frozen=True)
class Number:
    """A number of a text: its value as written, and whether a percent sign follows it (12% is not 12, nor 0.12)."""

    value: Fraction
    percent: bool = False


def ascii_signs(text: str) -> str:
    """The text with the typographic signs of arithmetic as -, * and /; its length stays."""
    return text.translate(_ASCII)


def value_of(digits: str) -> Fraction:
    """The exact value of digits as written, without a sign: `1,234.5` is 2469/2."""
    return Fraction(digits.replace(",", ""))


def numbers(text: str) -> list[Number]:
    """Every number of the first `LONGEST` characters, in order, in time linear in them.

    A fraction (1/2, 1 1/2, LaTeX) is one number; a division by 0 is none. Without floating point.
    """
    text = ascii_signs(text[:LONGEST])
    text = _LATEX_FRACTION.sub(r" \1/\2 ", text).replace("\\%", "%").replace("\\$", "$")
    text = _LATEX.sub(" ", text)

    # Each turn reads one number: one match, or two or three that a slash makes a fraction of.
    matches = list(PROSE.unsigned.finditer(text))
    read: list[Number] = []
    place = 0
    while place < len(matches):
        value, length = _fraction(text, matches[place : place + 3])
        first = matches[place]
        last = matches[place + length - 1]
        place += length
        if value is None:
            continue
        if PROSE.is_negative(text, first.start()):
            value = -value
        percent = text[last.end() : last.end() + 9].lstrip().startswith(("%", "percent"))
        read.append(Number(value, percent))
    return read


def _fraction(text: str, matches: list[re.Match[str]]) -> tuple[Fraction | None, int]:
    """(value, matches it takes) of the number that begins with the first of up to three matches; None: n / 0."""
    value = value_of(matches[0][0])
    gaps = [text[a.end() : b.start()] for a, b in pairwise(matches)]
    if gaps and gaps[0].strip() == "/":
        divisor = value_of(matches[1][0])
        return (value / divisor if divisor else None), 2
    if len(gaps) == 2 and gaps[0].isspace() and gaps[1] == "/":
        divisor = value_of(matches[2][0])
        if divisor:
            return value + value_of(matches[1][0]) / divisor, 3
    return value, 1


def is_plain(text: str) -> bool:
    """Whether no root, power or word of size (12 million) changes a number of the text: `numbers` does not read them.

    Units such as m² are no change.
    """
    return _CHANGED.search(text) is None


def final_number(text: str) -> str | None:
    """The final number of a worked answer in plain digits, such as `-1234.5`; None where there is none.

    The first number after the first `####` (GSM8K's mark), else the last number of the text. `$`, commas between
    thousands, trailing points and zeros after the point are dropped; a hyphen after a digit or letter is no sign.
    """
    answer = text.partition(_MARK)[2]
    match = ANSWER.unsigned.search(answer)
    if match is None:
        answer = text
        matches = list(ANSWER.unsigned.finditer(text))
        if not matches:
            return None
        match = matches[-1]

    # Plain digits: no separators, no zeros that say nothing, no sign on a zero.
    whole, _, part = match[0].replace(",", "").partition(".")
    number = whole.lstrip("0") or "0"
    if part.rstrip("0"):
        number += "." + part.rstrip("0")
    negative = number != "0" and ANSWER.is_negative(answer, match.start())
    return "-" + number if negative else number
