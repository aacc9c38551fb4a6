"""`--verifier`: how an answer to own data is judged against the gold answer of its row.

Each verifier is a scorer with Reasoning Gym's `score_answer(answer, entry)`, so that limits of time, refusals and
counts of errors are those of every other task.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from own_tasks.functions import imported
from own_tasks.trusted import FUNCTION
from text_data.answers import bare, gold_of
from text_data.choices import option_letter
from text_data.equality import OPTION
from text_data.numbers import one_number

FORM = "exact, number, choice, regex:PATTERN or PKG.MOD:FUNCTION"


@dataclass(frozen=True)
class Verifier:
    """How answers are judged.

    text: as --verifier was typed.
    needs: what a gold answer that fails lacks, a clause that goes on from its place.
    score: (answer, entry) -> a score of which 1 is a solved item; entry has `question`, `answer` and `metadata`.
    config: none, since no data set class stands behind it as behind other tasks' scorers.
    """

    text: str
    needs: str
    score: Callable[[str, Mapping[str, Any]], Any]
    config: None = None

    def score_answer(self, answer: str | None, entry: Mapping[str, Any]) -> float:
        """The score of an answer. Raises TypeError where a user's function returns no number."""
        given = self.score((answer or "").strip(), entry)
        if given is None or not isinstance(given, bool | int | float) and not hasattr(given, "__float__"):
            raise TypeError(f"it returned {type(given).__name__}, expected a number of which 1 is right")
        return float(given)


def verifier_of(text: str) -> Verifier:
    """The verifier that `--verifier` names; a function of the user's is imported.

    Raises:
        ValueError: one line: no such verifier, no regular expression, a function that cannot be imported.
    """
    if text in _BUILT_IN:
        return Verifier(text, *_BUILT_IN[text])
    kind, _, pattern = text.partition(":")
    if kind == "regex":
        return _regex(text, pattern)

    named = FUNCTION.fullmatch(text)
    if named is None:
        raise ValueError(f"--verifier {text} is not legal: expected {FORM}")
    return Verifier(text, "the verifier calls wrong", imported(text, "--verifier"))


# --- built in ---------------------------------------------------------------------------------------------------------


def _exact(answer: str, entry: Mapping[str, Any]) -> bool:
    """The same text, white space at its ends aside."""
    return answer == entry["answer"].strip()


def _number(answer: str, entry: Mapping[str, Any]) -> bool:
    """One number, the gold answer's; behind `####` where there is one."""
    gold = one_number(gold_of(entry["answer"]))
    return gold is not None and one_number(gold_of(answer)) == gold


def _choice(answer: str, entry: Mapping[str, Any]) -> bool:
    """The letter of the gold answer's option."""
    gold = OPTION.fullmatch(bare(gold_of(entry["answer"])))
    return gold is not None and option_letter(answer) == (gold[1] or gold[2]).upper()


_BUILT_IN = {
    "exact": ("is empty", _exact),
    "number": ("holds no number that is the answer", _number),
    "choice": ("names no option: expected its letter, such as B or (B)", _choice),
}


def _regex(text: str, pattern: str) -> Verifier:
    """What the pattern finds last (its first group where it has one) must be the same in answer and gold answer."""
    try:
        form = re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"--verifier {text}: {pattern!r} is no regular expression: {error}") from error
    if not pattern:
        raise ValueError("--verifier regex: needs a pattern behind the colon, such as regex:answer is (.*)")

    def found(answer: str) -> str | None:
        matches = list(form.finditer(answer))
        if not matches:
            return None

        # A group that takes no part in the match is None.
        last = matches[-1]
        if not form.groups:
            return last[0].strip()
        return last[1] and last[1].strip()

    def score(answer: str, entry: Mapping[str, Any]) -> bool:
        gold = found(entry["answer"].strip())
        return gold is not None and found(answer) == gold

    return Verifier(text, "does not match the pattern", score)
