"""When two short answers are the same: by value, by option, or by text."""

from __future__ import annotations

import re
from typing import Any

from text_data.answers import bare, gold_of, same_text
from text_data.choices import option_letter
from text_data.numbers import one_number

LONGEST_ANSWER = 1_000  # characters; longer text holds no number that is the answer
# An answer that is a number: nothing stands before it but signs, a box, a name (`x =`) or `about`.
BEGINS_WITH_NUMBER = re.compile(
    r"(?:[^\w\s]|\s|\\[A-Za-z]+|[A-Za-z]\w{0,9}\s*[=:]"
    r"|(?:the|answer|is|it|final|about|approximately|minus|negative|usd|eur|gbp|us|rs)\b){0,40}(?:\d|½|¼|¾)",
    re.I,
)
OPTION = re.compile(r"\(?([A-Za-z])\)?|\(([A-Z])\)\s.*", re.S)  # `B`, `(B)`, `(B) Paris`


def same_answer(solution: str, answer: Any) -> bool:
    """Whether the solution holds exactly one number and it is the answer's (behind `####`, where it has that mark).

    Units, currency, thousands separators, fractions and words around it do not matter; a percent sign must stand in
    both or in neither. An answer that is a letter is compared with the option that the solution names. One that is
    neither is compared as normalised text, and so is a solution whose number is changed by what stands at it (√9, 3²,
    12 million, `not 5`).
    """
    if answer is None:
        return False
    wanted = gold_of(str(answer))
    if not wanted or len(solution) > max(LONGEST_ANSWER, len(wanted)):
        return False

    # By value where both sides are plain numbers, by letter where the answer is an option, else by text.
    gold = one_number(wanted) if BEGINS_WITH_NUMBER.match(wanted) else None
    if gold is not None:
        number = one_number(solution)
        if number is not None:
            return number == gold
    option = OPTION.fullmatch(bare(wanted))
    if option is not None and option_letter(solution) == (option[1] or option[2]).upper():
        return True
    return same_text(solution, wanted)
