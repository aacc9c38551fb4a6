"""Equations in running text, read exactly: rational values, no floating point, time linear in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise

from text_data.notation import DIGITS, ascii_signs
from text_data.numbers import LONGEST, numbers, value_of

LEFT = 160  # characters read before an equals sign
RIGHT = 60  # characters read after it

_TOKEN = re.compile(rf"(?P<space>[\s$]+)|(?P<number>{DIGITS})|(?P<operator>[-+*/x])|(?P<other>.)", re.A | re.S)
_WRITTEN = re.compile(rf"(?<![A-Za-z_])(?:{DIGITS})(?:[eE][-+]?\d{{1,2}}(?!\w))?", re.A)
# Numbers that a prompt may give in words, and what its units bring with them: minutes to the hour, days to the week.
_WORDS = dict(
    zip(
        (
            "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
            "seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred thousand "
            "half twice double triple thrice quarter dozen percent hour minute week year"
        ).split(),
        (*range(21), *range(30, 91, 10), 100, 1000, 2, 2, 2, 3, 3, 4, 12, 100, 60, 60, 7, 12),
        strict=True,
    )
)


Expression = tuple[tuple[Fraction, ...], str]  # operands, and the operators between them as one text


@dataclass(frozen=True)
class Step:
    """One equation of a text.

    Args:
        operands: of the left side; where the right side is an expression too, its operands follow.
        operators: of the left side, each one of + - * /.
        result: the right side; None where it is an expression.
        right: whether the two sides agree, exactly or to the two or more decimals that the result is given with.
    """

    operands: tuple[Fraction, ...]
    operators: str
    result: Fraction | None
    right: bool

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for the same step: in pure sums and products the order of operands is no difference."""
        operands = self.operands
        if len(set(self.operators)) == 1 and self.operators[0] in "+*":
            operands = tuple(sorted(operands))
        return operands, self.operators, self.result


def divisions(text: str) -> set[tuple[str, str]]:
    """(dividend, divisor) of every division that the text shows, as written but for signs and separators."""
    text = ascii_signs(text[:LONGEST]).replace(",", "")
    return set(re.findall(r"(?=(?<![\d.])(\d+(?:\.\d+)?)\s*/\s*-?\s*(\d+(?:\.\d+)?))", text, re.A))


def mentioned(prompt: str) -> set[Fraction]:
    """Sizes of the numbers that a prompt mentions, signs aside.

    Numbers count in digits and in words (half and twice are 2, a dozen is 12), the parts of a fraction by themselves
    too, and what units bring with them: 100 with a percent sign, 60 with hours.
    """
    sizes = set()
    for number in numbers(prompt):
        sizes.add(abs(number.value))
        if number.percent:
            sizes |= {abs(number.value) / 100, Fraction(100)}

    # Words, in singular or plural.
    words = {word.removesuffix("s") for word in re.findall(r"[a-z]+", prompt[:LONGEST].lower())}
    sizes |= {Fraction(_WORDS[word]) for word in words & set(_WORDS)}

    # Parts of fractions, which `numbers` reads as one number.
    sizes |= {value_of(match[0]) for match in _WRITTEN.finditer(prompt[:LONGEST])}
    return sizes


# --- equations --------------------------------------------------------------------------------------------------------


def steps(text: str) -> Iterator[Step]:
    """Equations `a op b = c` of the text with + - * /, chains too.

    What cannot be read whole (brackets, powers, units between the operands) is passed over.
    """
    text = ascii_signs(text[:LONGEST]).replace("==", "=")
    parts = text.split("=")
    for before, after in pairwise(parts):
        # An underscore, which is part of no expression, marks a side whose beginning was cut off.
        mark = "_" if len(before) > LEFT else ""
        line = before[-LEFT:].rpartition("\n")[2]
        left = _suffix(_tokens(mark + line))
        right = _prefix(_tokens(after[:RIGHT].partition("\n")[0]))
        if left is None or right is None or not left[1]:
            continue

        # A right side with an operator is an expression; what it equals stands behind the next equals sign.
        operands, operators = left
        exact = _evaluate(*left)
        stated = _evaluate(*right)
        holds = exact is not None and stated is not None and (exact == stated or _rounds(exact, stated, right, after))
        if right[1]:
            yield Step(operands + right[0], operators, None, holds)
        else:
            yield Step(operands, operators, right[0][0], holds)


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of the text's tokens, white space and dollar signs left out."""
    tokens = []
    for match in _TOKEN.finditer(text):
        if match.lastgroup != "space":
            tokens.append((match.lastgroup or "", match[0]))
    return tokens


def _suffix(tokens: list[tuple[str, str]]) -> Expression | None:
    """The longest `number (op number)*` that ends the tokens, or None where it is part of more; uses up the tokens."""
    operands: list[Fraction] = []
    operators = ""
    while _ends_with(tokens, "number"):
        operands.insert(0, value_of(tokens.pop()[1]))
        if not _ends_with(tokens, "operator"):
            break
        operator = tokens.pop()[1]

        # An operator with no number before it can only be the sign of the number behind it.
        if not _ends_with(tokens, "number"):
            if operator != "-":
                return None
            operands[0] = -operands[0]
            if not _ends_with(tokens, "operator"):
                break
            operator = tokens.pop()[1]
            if not _ends_with(tokens, "number"):
                return None
        operators = operator.replace("x", "*") + operators

    # Before a whole expression nothing may stand that belongs to it.
    cut_off = _ends_with(tokens, "number") or (bool(tokens) and tokens[-1][1] in ")^%!_")
    if not operands or cut_off:
        return None
    return tuple(operands), operators


def _ends_with(tokens: list[tuple[str, str]], kind: str) -> bool:
    return bool(tokens) and tokens[-1][0] == kind


def _prefix(tokens: list[tuple[str, str]]) -> Expression | None:
    """The longest `number (op number)*` that begins the tokens; None if there is none or it is part of more."""
    operands: list[Fraction] = []
    operators = ""
    place = 0
    while True:
        # A number with its sign; where none follows, the operator before was punctuation.
        sign = 1
        if tokens[place : place + 1] == [("operator", "-")]:
            sign = -1
            place += 1
        if not _kind_at(tokens, place, "number"):
            operators = operators[: max(len(operands) - 1, 0)]
            break
        operands.append(sign * value_of(tokens[place][1]))
        place += 1

        if not _kind_at(tokens, place, "operator"):
            break
        operators += tokens[place][1].replace("x", "*")
        place += 1

    # Behind a whole expression nothing may stand that belongs to it.
    cut_off = _kind_at(tokens, place, "number") or (place < len(tokens) and tokens[place][1] in "(^%!_")
    if not operands or cut_off:
        return None
    return tuple(operands), operators


def _kind_at(tokens: list[tuple[str, str]], place: int, kind: str) -> bool:
    return place < len(tokens) and tokens[place][0] == kind


def _evaluate(operands: tuple[Fraction, ...], operators: str) -> Fraction | None:
    """The value by the usual precedence; None for a division by zero."""
    terms = [operands[0]]
    for operator, operand in zip(operators, operands[1:], strict=True):
        if operator == "*":
            terms[-1] *= operand
        elif operator == "/":
            if operand == 0:
                return None
            terms[-1] /= operand
        elif operator == "+":
            terms.append(operand)
        else:
            terms.append(-operand)
    return sum(terms, Fraction(0))


def _rounds(exact: Fraction, stated: Fraction, right: Expression, text: str) -> bool:
    """Whether `stated` is `exact` rounded to the decimals it is written with, at least two.

    `right` is the side that states it, read from the beginning of `text`.
    """
    written = _WRITTEN.search(text[:RIGHT])
    if written is None or right[1]:
        return False
    decimals = len(written[0].partition(".")[2])
    return decimals >= 2 and abs(exact - stated) <= Fraction(1, 2 * 10**decimals)


def sound_share(thought: str, prompt: str) -> float:
    """Share of a thought's distinct steps that are right; 0.0 without one.

    A right step counts only if each operand is mentioned in the prompt or came out of an earlier right step that did,
    and if the prompt does not hold the step itself. Adding 0 or multiplying by 1 counts only with the prompt's own 0 or
    1. A wrong step always counts, once.
    """
    given = mentioned(prompt)
    copied = {step.key for step in steps(prompt)}

    # A step counts once, at its first writing.
    derived = set(given)  # sizes that a step may work with
    seen = set()
    right = 0
    wrong = 0

    for step in steps(thought):
        if step.key in seen or step.key in copied:
            continue
        seen.add(step.key)

        if not step.right:
            wrong += 1
        elif all(abs(operand) in derived for operand in step.operands) and not _neutral(step) - given:
            right += 1
            if step.result is not None:
                derived.add(abs(step.result))
    return right / (right + wrong) if right else 0.0


def _neutral(step: Step) -> set[Fraction]:
    """Operands that change nothing: 0 in sums and differences, 1 in products and quotients."""
    neutral = set()
    for operator, *operands in zip(step.operators, step.operands, step.operands[1:], strict=False):
        idle = 0 if operator in "+-" else 1
        neutral |= {operand for operand in operands if operand == idle}
    return neutral
