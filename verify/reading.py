"""Judges a generated text twice: as it stands, and by the answer that is taken out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from text_data.taken import GENERIC, TEXT, is_number, taken_answer
from verify.judge import Verdict


@dataclass(frozen=True)
class Reading:
    """What the verifiers said of one text.

    verdict: by the way that was asked for.
    strict: the whole text is solved.
    extracted: the answer taken out of it is solved. A text that is solved as a whole always is: nothing surrounds its
        answer.
    answer: what the verdict is of: the text, or what the way that was asked for takes out of it.
    """

    verdict: Verdict
    strict: bool
    extracted: bool
    answer: str


def read_answer(verify: Callable[[str], Verdict], text: str, gold: str | None, way: str) -> Reading:
    """Judges `text` as a whole, and where that is not solved by the answer that is taken out of it.

    Args:
        verify: the verifier of the item.
        text: what was generated.
        gold: the item's gold answer, which says only whether a number is looked for; None = it has none.
        way: `--answer_from`. With `text` the verdict is that of the whole text, and what is taken beside it is what
            `GENERIC` finds.
    """
    whole = verify(text)
    if whole.solved:
        return Reading(whole, True, True, text)

    asked = GENERIC if way == TEXT else way
    answer = taken_answer(text, asked, is_number(gold))
    if answer == text.strip():
        return Reading(whole, False, False, text)

    taken = verify(answer)
    if way == TEXT:
        return Reading(whole, False, taken.solved, text)
    return Reading(taken, False, taken.solved, answer)


def verdict_by(verify: Callable[[str], Verdict], text: str, gold: str | None, way: str) -> Verdict:
    """The verdict of `read_answer` alone: with `text` nothing beside the whole text is judged."""
    if way == TEXT:
        return verify(text)
    return read_answer(verify, text, gold, way).verdict
