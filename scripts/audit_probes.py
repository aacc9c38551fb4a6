"""What `audit_verifiers.py` answers to a task's scorer: constants, mangled golds, appended text, the input."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

CONSTANTS = (
    *("", "\n \t", "0", "1", "2", "-1", "24", "1.0", "nan", "inf", "None", "yes", "no", "Yes", "No", "True", "False"),
    *("a", "A", "A lot of words that answer nothing.", "[]", "{}", "[[0]]", "0 0 0", "()", "x", "C", "6*4*1*1"),
)
RIGHT = ("gold", "gold with thousands commas", "gold in spaces")  # the only probes that should be accepted
MOST_INPUTS = 6  # strings of an item's metadata that are copied
MOST_CHARACTERS = 4000  # of a copied input


def probes_of(example: Any, other: str | None, commonest: str | None) -> dict[str, str]:
    """Name of the probe -> its text, for one item. Wrong probes that happen to say the gold answer are left out.

    Not so those that copy the input: how often that is right is what they ask.

    Args:
        example: the item.
        other: the gold answer of another item.
        commonest: the gold answer that most items have.
    """
    gold = example.target
    probes: dict[str, str] = {}
    if gold is not None:
        probes |= dict(right_ones(gold))

    wrong = {f"constant {text!r}": text for text in CONSTANTS}
    if commonest is not None:
        wrong["commonest gold"] = commonest
    if gold is not None:
        wrong |= dict(mangled(gold))
        if other is not None and not says(other, gold):
            wrong |= appended(gold, other)

    for name, text in wrong.items():
        if gold is None or not says(text, gold):
            probes[name] = text
    return probes | dict(copied(example))


def right_ones(gold: str) -> Iterator[tuple[str, str]]:
    """What should be accepted: the gold answer, and the same number in another spelling."""
    yield "gold", gold
    yield "gold in spaces", f" \n{gold}\n "
    if re.fullmatch(r"-?\d{4,}", gold.strip()):
        yield "gold with thousands commas", f"{int(gold):,}"


def mangled(gold: str) -> Iterator[tuple[str, str]]:
    """The gold answer spoilt."""
    yield "gold, last character cut", gold[:-1]
    yield "gold, first half", gold[: len(gold) // 2]
    yield "gold, first character", gold[:1]
    yield "gold, first word", (gold.split() or [""])[0]
    yield "gold, a digit behind", gold + "7"
    yield "not GOLD", "not " + gold
    yield "gold reversed", gold[::-1]
    yield "gold, words reversed", " ".join(reversed(gold.split()))

    value = number(gold)
    if value is None or not math.isfinite(value):
        return
    flipped = gold.strip()
    yield "gold, sign flipped", flipped[1:] if flipped.startswith("-") else "-" + flipped
    yield "gold, rounded to a whole number", str(round(value))
    yield "gold, rounded to 3 places", str(round(value, 3))
    yield "gold, one more", str(value + 1) if "." in gold else str(int(value) + 1)


def appended(gold: str, other: str) -> dict[str, str]:
    """The gold answer beside a wrong one."""
    return {
        "gold, then a wrong one (line)": f"{gold}\n{other}",
        "gold, then a wrong one (space)": f"{gold} {other}",
        "gold, then a wrong one (comma)": f"{gold}, {other}",
        "gold or a wrong one": f"{gold} or {other}",
        "a wrong one, then gold": f"{other}\n{gold}",
        "another item's gold": other,
    }


def copied(example: Any) -> Iterator[tuple[str, str]]:
    """What the item itself says, given back."""
    question = example.question
    yield "input: the question", question
    words = question.split()
    yield "input: its last word", words[-1] if words else ""
    yield "input: its longest word", max(words, key=len, default="")
    yield "input: its last line", (question.strip().splitlines() or [""])[-1]

    # The parts that the question was made of.
    taken = 0
    metadata = example.entry["metadata"]
    for key, value in metadata.items():
        if key == "integrand":
            yield "Integral(integrand, x)", f"Integral({value}, {metadata.get('variable', 'x')})"
        is_answer = any(word in key for word in ("solution", "answer", "result"))
        if isinstance(value, str) and value.strip() and value in question and taken < MOST_INPUTS and not is_answer:
            taken += 1
            yield f"input: {key}", value[:MOST_CHARACTERS]
        if isinstance(value, list) and len(value) > 1 and all(isinstance(part, str) for part in value):
            yield f"input: two of {key} joined", f"({value[0]} ∧ {value[1]})"


def says(text: str, gold: str) -> bool:
    """Whether a text is the gold answer in another spelling of letters, blanks and numbers."""
    if " ".join(text.lower().split()) == " ".join(gold.lower().split()):
        return True
    value = number(text)
    return value is not None and value == number(gold)


def number(text: str) -> float | None:
    """The text as a number; None where it is none."""
    try:
        return float(text.strip())
    except (ValueError, OverflowError):
        return None
