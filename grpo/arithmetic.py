"""Equations in running text, read exactly: rational values, no floating point, time linear in the text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

from text_data.numbers import DIGITS, LONGEST, PROSE, ascii_signs, numbers, value_of

LEFT, RIGHT = 160, 60  # characters read on either side of an equals sign

_TOKEN = re.compile(rf"(?P<space>[\s$]+)|(?P<number>{DIGITS})|(?P<operator>[-+*/x])|(?P<other>.)", re.A | re.S)
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


@dataclass(frozen=True)
class Step:
    """One equation of a text: operands and operators of its left side, and what stands on the right.

    `right`: the two sides agree, exactly or to the two or more decimals that the result is given with. `result` is None
    where the right side is an expression too, whose operands then stand among `operands`.
    """

    operands: tuple[Fraction, ...]
    operators: str
    result: Fraction | None
    right: bool

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for the same step: in pure sums and products the order of operands is no difference."""
        swaps = len(set(self.operators)) == 1 and self.operators[0] in "+*"
        return (tuple(sorted(self.operands)) if swaps else self.operands), self.operators, self.result


def divisions(text: str) -> set[tuple[str, str]]:
    """(dividend, divisor) of every division that the text shows, as written but for signs and separators."""
    text = ascii_signs(text[:LONGEST]).replace(",", "")
    return set(re.findall(r"(?=(?<![\d.])(\d+(?:\.\d+)?)\s*/\s*-?\s*(\d+(?:\.\d+)?))", text, re.A))


def mentioned(prompt: str) -> set[Fraction]:
    """Sizes of the numbers a prompt mentions: in digits, in words (half and twice are 2, a dozen is 12), and those that
    its units bring with them (100 with a percent sign, 60 with hours)."""
    found = set()
    for number in numbers(prompt):
        found |= {abs(number.value), *[abs(number.value) / 100, Fraction(100)] * number.percent}
    words = {word.removesuffix("s") for word in re.findall(r"[a-z]+", prompt[:LONGEST].lower())}
    found |= {Fraction(_WORDS[word]) for word in words & set(_WORDS)}
    return found | {value_of(match[0]) for match in PROSE.unsigned.finditer(prompt[:LONGEST])}  # fractions' parts too


# --- equations --------------------------------------------------------------------------------------------------------


def steps(text: str) -> Iterator[Step]:
    """Equations `a op b = c` of the text with + - * /, chains too; what cannot be read whole (brackets, powers, units
    between the operands) is passed over."""
    text = ascii_signs(text[:LONGEST]).replace("==", "=")
    parts = text.split("=")
    for before, after in zip(parts, parts[1:], strict=False):
        left = _suffix(_tokens(("_" if len(before) > LEFT else "") + before[-LEFT:].rpartition("\n")[2]))
        right = _prefix(_tokens(after[:RIGHT].partition("\n")[0]))
        if left is None or right is None or not left[1]:
            continue
        ours, theirs = _evaluate(*left), _evaluate(*right)
        holds = ours is not None and theirs is not None and (ours == theirs or _rounds(ours, theirs, right, after))
        yield Step(left[0] + (right[0] if right[1] else ()), left[1], None if right[1] else right[0][0], holds)


def _tokens(text: str) -> list[tuple[str, str]]:
    """(kind, text) of the text's tokens, white space and dollar signs left out."""
    return [(match.lastgroup or "", match[0]) for match in _TOKEN.finditer(text) if match.lastgroup != "space"]


def _suffix(tokens: list[tuple[str, str]]) -> tuple[tuple[Fraction, ...], str] | None:
    """The longest `number (op number)*` that ends the tokens, or None if it is part of something else."""
    operands: list[Fraction] = []
    operators = ""
    while tokens and tokens[-1][0] == "number":
        operands.insert(0, value_of(tokens.pop()[1]))
        if not tokens or tokens[-1][0] != "operator":
            break
        operator = tokens.pop()[1]
        if not tokens or tokens[-1][0] != "number":
            if operator != "-":
                return None
            operands[0] = -operands[0]
            if not tokens or tokens[-1][0] != "operator":
                break
            operator = tokens.pop()[1]
            if not tokens or tokens[-1][0] != "number":
                return None
        operators = operator.replace("x", "*") + operators
    cut_off = bool(tokens) and (tokens[-1][0] == "number" or tokens[-1][1] in ")^%!_")
    return None if not operands or cut_off else (tuple(operands), operators)


def _prefix(tokens: list[tuple[str, str]]) -> tuple[tuple[Fraction, ...], str] | None:
    """The longest `number (op number)*` that begins the tokens; None if there is none or it is part of more."""
    operands, operators, place = [], "", 0
    while True:
        sign = 1
        if tokens[place : place + 1] == [("operator", "-")]:
            sign, place = -1, place + 1
        if place >= len(tokens) or tokens[place][0] != "number":
            operators = operators[: max(len(operands) - 1, 0)]  # the operator was punctuation
            break
        operands.append(sign * value_of(tokens[place][1]))
        place += 1
        if place >= len(tokens) or tokens[place][0] != "operator":
            break
        operators += tokens[place][1].replace("x", "*")
        place += 1
    cut_off = place < len(tokens) and (tokens[place][0] == "number" or tokens[place][1] in "(^%!_")
    return None if not operands or cut_off else (tuple(operands), operators)


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
        else:
            terms.append(operand if operator == "+" else -operand)
    return sum(terms, Fraction(0))


def _rounds(exact: Fraction, given: Fraction, right: tuple[tuple[Fraction, ...], str], text: str) -> bool:
    """Whether `given` is `exact` rounded to the decimals it is written with, at least two."""
    written = PROSE.unsigned.search(text[:RIGHT])
    decimals = len(written[0].partition(".")[2]) if written and not right[1] else 0
    return decimals >= 2 and abs(exact - given) <= Fraction(1, 2 * 10**decimals)


def sound_share(thought: str, prompt: str) -> float:
    """Share of a thought's distinct steps that are right; 0.0 without one.

    A right step counts only if each operand is mentioned in the prompt or came out of an earlier right step that did,
    and if the prompt does not hold the step itself. Adding 0 or multiplying by 1 counts only with the prompt's own 0 or
    1. A wrong step always counts, once.
    """
    given, copied = mentioned(prompt), {step.key for step in steps(prompt)}
    known, seen, right, wrong = set(given), set(), 0, 0
    for step in steps(thought):
        if step.key in seen or step.key in copied:
            continue
        seen.add(step.key)
        if not step.right:
            wrong += 1
        elif all(abs(operand) in known for operand in step.operands) and not _neutral(step) - given:
            right += 1
            if step.result is not None:
                known.add(abs(step.result))
    return right / (right + wrong) if right else 0.0


def _neutral(step: Step) -> set[Fraction]:
    """Operands that change nothing: 0 in sums and differences, 1 in products and quotients."""
    near = zip(step.operators, step.operands, step.operands[1:], strict=False)
    return {n for op, *pair in near for n in pair if n == (0 if op in "+-" else 1)}
