"""Rules of the tasks whose answers are figures: right to the precision asked for, no more and no less."""

from __future__ import annotations

import math
import re
from datetime import datetime
from decimal import ROUND_HALF_EVEN, Decimal
from fractions import Fraction

from verify.forms import exponent_of, fraction, matched, number, parts, shortened, whole
from verify.table import Entry, strict, strict_form

COIN_DECIMALS = 4  # as many as the scorer's tolerance
COIN_SHARE = Fraction(1, 20)  # of the probability itself, so that 0 is not near a small one
HALF_A_THOUSANDTH = 0.0005 + 1e-9
HALF_A_HUNDREDTH = 0.005 + 1e-9
LONGEST = 200  # characters of a figure that a scorer may see: some build the number that 1e999999999 names

PAIR = re.compile(r"\(?\s*([^\s,()]+)\s*,\s*([^\s,()]+)\s*\)?")
_SIZE = r"(?:\d+\.?\d*|\.\d+)"
REAL = re.compile(rf"[+-]?{_SIZE}", re.A)
COMPLEX = re.compile(rf"([+-]?{_SIZE}(?=[+-]))?([+-]?{_SIZE}?)[ij]", re.A)
FRACTION = re.compile(r"\\d?frac\s*\{\s*(\d+)\s*\}\s*\{\s*(\d+)\s*\}|(\d+)\s*/\s*(\d+)", re.A)
FACTORS = re.compile(r"\d+(?:\s*×\s*\d+){0,200}", re.A)
INTEGER = re.compile(r"[+-]?(?:0x[0-9a-f]+|0b[01]+|0o[0-7]+|\d+)", re.A | re.I)
DAYS = re.compile(r"(-?\d{1,6})(?: days?)?", re.A)
CLOCK = re.compile(r"(?:(-?\d{1,6}) days?, *)?(-?)(\d{1,6}):([0-5]\d)(?::([0-5]\d)(?:\.(\d{1,3}))?)?", re.A)
PRECISION = re.compile(r"maximum of (\d+) significant digits")


def is_short(answer: str, entry: Entry) -> bool:
    """Whether a text is short enough for its scorer, and names no number of more than three digits of exponent."""
    return len(answer) <= LONGEST and not re.search(r"[eE][+-]?\d{4}", answer)


@strict("coin_flip", name="the exact fraction, or it rounded to 4 decimals or more", readable=is_short)
def right_probability(answer: str, entry: Entry) -> bool:
    ratio = entry["metadata"]["rational"]
    right = Fraction(ratio["numerator"], ratio["denominator"])
    if fraction(answer) == right:
        return True

    # Rounded, not cut: as near as its own decimals allow, and not to "never" or "always".
    given = number(answer)
    decimals = -exponent_of(given)
    error = abs(Fraction(given) - right)
    near = 2 * error * 10**decimals <= 1 and error <= COIN_SHARE * right
    return decimals >= COIN_DECIMALS and near and given != 1


@strict("complex_arithmetic", name="the gold number as a + bi")
def right_complex(answer: str, entry: Entry) -> bool:
    text = "".join(answer.replace("\u2212", "-").lower().split())
    while text.startswith("(") and text.endswith(")"):
        text = text[1:-1]

    if REAL.fullmatch(text):
        given = (float(text), 0.0)
    else:
        real, imaginary = matched(COMPLEX, text).groups()
        if imaginary in ("", "+", "-"):  # a sign alone before i, or nothing, is a one
            imaginary += "1"
        given = (float(real or 0), float(imaginary))
    return math.dist(given, entry["metadata"]["result"]) <= 1e-9


@strict("decimal_arithmetic", name="one number, right to all digits asked for", one_answer=True)
def right_decimal(answer: str, entry: Entry) -> bool:
    gold = number(entry["answer"])
    given = number(answer)
    digits = int(PRECISION.findall(entry["question"])[0])
    if len(shortened(given)[0].lstrip("0")) > digits:
        return False

    # One unit of the last digit asked for: intermediate results may be rounded or not.
    unit = Decimal(0) if gold == 0 else Decimal(10) ** (gold.adjusted() - digits + 1)
    return abs(given - gold) <= unit


@strict("number_format", name="one of the numbers, right to 3 decimals", one_answer=True)
def right_candidate(answer: str, entry: Entry) -> bool:
    return abs(number(answer) - Decimal(entry["metadata"]["solution"])) <= Decimal(HALF_A_THOUSANDTH)


@strict("power_function", name="one finite number", readable=is_short)
def one_number(answer: str, entry: Entry) -> bool:
    return number(answer).is_finite()


@strict("pool_matrix", name="the gold matrix, each number right to 2 decimals", one_answer=True)
def right_matrix(answer: str, entry: Entry) -> bool:
    gold = entry["metadata"]["solution"]
    given = [[number(cell) for cell in line.split()] for line in answer.splitlines() if line.strip()]
    if [len(row) for row in given] != [len(row) for row in gold]:
        return False

    for row, right_row in zip(given, gold, strict=True):
        for cell, right in zip(row, right_row, strict=True):
            if abs(float(cell) - right) > HALF_A_HUNDREDTH:
                return False
    return True


@strict("advanced_geometry", name="the gold figure, right to 3 decimals (an angle: to 2)", one_answer=True)
def right_geometry(answer: str, entry: Entry) -> bool:
    facts = entry["metadata"]
    if facts["task_type"] == "orthocenter":
        point = [_to_thousandths(coordinate) for coordinate in matched(PAIR, answer).groups()]
        right = facts["orthocenter_approx"]
        return all(abs(one - other) <= HALF_A_THOUSANDTH for one, other in zip(point, right, strict=True))

    if facts["task_type"] == "angle_measure":
        given = _to_thousandths(answer.removesuffix("°"))
        return abs(given - facts["angle_ABC_degrees"]) <= HALF_A_HUNDREDTH
    return abs(_to_thousandths(answer) - facts["incircle_radius_approx"]) <= HALF_A_THOUSANDTH


def _to_thousandths(text: str) -> float:
    """A number of at most three decimals, zeros behind them aside. Raises ValueError."""
    value = number(text)
    if value and shortened(value)[1] < -3:
        raise ValueError("more decimals than asked for")
    return float(value)


@strict("polynomial_equations", name="the gold numbers and no others, commas between")
def right_roots(answer: str, entry: Entry) -> bool:
    gold = sorted(number(part) for part in parts(entry["answer"]) if part)
    if answer.strip("\"'") == "":  # how the task wants "no real root" to be said
        return not gold
    given = sorted(number(part) for part in parts(answer))
    return given == gold


@strict("fraction_simplification", name="one fraction, a/b or LaTeX")
def one_fraction(answer: str, entry: Entry) -> bool:
    match = FRACTION.fullmatch(answer.strip().strip("$").strip())
    if match is None:
        return False
    numerator, denominator = [int(part) for part in match.groups() if part is not None]
    facts = entry["metadata"]
    return (numerator, denominator) == (facts["simplified_numerator"], facts["simplified_denominator"])


strict_form("prime_factorization", FACTORS, name="factors with × between")
strict_form("bitwise_arithmetic", INTEGER, name="one integer, in hexadecimal or another base")


@strict("calendar_arithmetic", name="the gold number or word", one_answer=True)
def right_date(answer: str, entry: Entry) -> bool:
    gold = entry["answer"].strip()
    if re.fullmatch(r"-?\d+", gold):
        return whole(answer) == int(gold)
    if gold.lower() in ("yes", "no"):
        return answer.lower() == gold.lower()
    return answer == gold


@strict("time_intervals", name="one duration in the form asked for", one_answer=True)
def right_duration(answer: str, entry: Entry) -> bool:
    gold = entry["answer"].strip()
    if entry["metadata"]["task_type"] == "date":
        return matched(DAYS, answer)[1] == matched(DAYS, gold)[1]

    given = _milliseconds(answer)
    if given == _milliseconds(gold):
        return True
    return "." in answer and "." in gold and given == _elapsed(entry)


def _milliseconds(text: str) -> tuple[str, int, int, int, int]:
    """(sign of the hours, days, hours, minutes, milliseconds) of `D days, HH:MM:SS.mmm`.

    Raises ValueError for another form.
    """
    days, sign, hours, minutes, seconds, rest = matched(CLOCK, text).groups()
    thousandths = int(seconds or 0) * 1000 + int((rest or "0").ljust(3, "0"))
    return sign, int(days or 0), int(hours), int(minutes), thousandths


def _elapsed(entry: Entry) -> tuple[str, int, int, int, int]:
    """The true time between the two of an item, where the gold answer has lost a millisecond to rounding."""
    facts = entry["metadata"]
    start = datetime.fromisoformat(facts["start_time"])
    end = datetime.fromisoformat(facts["end_time"])
    thousandths = int(Decimal((end - start).total_seconds() * 1000).to_integral_value(ROUND_HALF_EVEN))
    minutes, thousandths = divmod(thousandths, 60_000)
    hours, minutes = divmod(minutes, 60)
    return "", 0, hours, minutes, thousandths
