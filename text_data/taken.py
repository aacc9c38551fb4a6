r"""How the answer is taken out of a generated text (`--answer_from`), and how one is written so that it is found.

    text         the whole text
    last_number  where the gold answer is a number: the final number of the text (`final_number`); else what the last
                 box or tag holds, or the text without Markdown, quotes and what follows the answer (`generic_answer`)
    tags         what the last `<answer>..</answer>` holds
    boxed        what the last `\boxed{..}` holds

A text in which nothing is found is its own answer.
"""

from __future__ import annotations

import re

from text_data.answers import bare, before_next_question, boxed_answer, tagged_answer
from text_data.numbers import final_number, one_number

TEXT = "text"
GENERIC = "last_number"  # reads answers of every kind, so it stands in where no way was chosen


def taken_answer(text: str, way: str, numeric: bool) -> str:
    """The answer that `way` finds in a generated text; the text itself where it finds none.

    `numeric` says whether the answer is known to be a number, see `is_number`.
    """
    found: str | None = text
    if way == "tags":
        found = tagged_answer(text)
    elif way == "boxed":
        found = boxed_answer(text)
    elif way == GENERIC:
        found = generic_answer(text, numeric)

    if found is None or not found.strip():
        return text
    return found.strip()


def generic_answer(text: str, numeric: bool) -> str | None:
    """The final number where the answer is one; else what the last box or tag holds, or the text without its dress."""
    if numeric:
        return final_number(text)
    return bare(before_next_question(text))


def is_number(gold: str | None) -> bool:
    """Whether a gold answer is one number and nothing else; digits behind a leading zero are a text of digits."""
    if gold is None or re.search(r"[A-Za-z]|\A\s*[-+]?0\d", gold):
        return False
    return one_number(gold) is not None


def written_answer(answer: str, way: str) -> str:
    """A solved example's answer in the form that `way` looks for."""
    if way == "tags":
        return f"<answer>{answer}</answer>"
    if way == "boxed":
        return rf"\boxed{{{answer}}}"
    return answer
