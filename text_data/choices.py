"""Options of a multiple-choice question in generated text: the one place that knows how a letter or an option is named.

`choose_option` reads an answer to a question whose options are known; `option_letter` reads the letter alone, for a
gold answer that is one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from text_data.answers import bare, before_next_question, marked_answer

LONGEST = 2_000  # characters behind an announcement that are read
TRIES = 20  # announcements that are looked at, from the last
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# What announces an answer: "the answer is", "Option:", "choice should be", "Ans.".
STATED = re.compile(
    r"\b(?:(?:answer|option|choice)(?:\s+(?:is|would be|should be|must be))?|ans\.?)(?![a-z])\s*[:=]?\s*"
    r"(?:(?:the\s+)?(?:option|choice|letter)\b\s*[:=]?\s*)?",
    re.IGNORECASE,
)
# What ends an announced option: the line, the sentence, a reason.
STATED_END = re.compile(r"[\n.;](?:\s|$)|\bbecause\b")
# A letter that opens an answer: bracketed, with a mark behind it, alone on its line, or a word of its own. A and I are
# words too, so they count only where a reason or a sentence's end follows.
OPENING_LETTER = re.compile(
    r"\s*(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Za-z])[.):](?!\w)|([A-Z])(?=\s*(?:$|[\n,;]))|([B-HJ-Z])(?=\s)"
    r"|([AI])(?=\s+(?:because|since|as|is (?:right|correct|true|the))\b))"
)
# A second letter that takes the first one's clearness: `B or C`, `(A) and (B)`, `A/B`.
ANOTHER_LETTER = re.compile(
    r"\s*[.):\]]?\s*(?:(?:,\s*)?(?:/|&|\b(?i:or|and|nor|maybe|perhaps)\b)\s*(?i:option\s+|maybe\s+|perhaps\s+)?"
    r"(?:\(([A-Za-z])\)|\[([A-Za-z])\]|([A-Z])(?![\w'’]))"
    r"|[,;]\s*(?:\(([A-Za-z])\)|([A-Z])(?=\s*(?:$|[.,;:)!?\n]))))"
)
DENIED = re.compile(r"\s*(?:not|never|neither|isn['’]t)\b", re.IGNORECASE)
DENIED_BEHIND = re.compile(r"\s*(?:[.):\]]\s*)?(?:is|was)(?:n['’]t|\s+(?:not|wrong|incorrect|false))\b", re.IGNORECASE)
BRACKETED_LETTER = re.compile(r"(?<!not )(?<!Not )\(([A-Z])\)")
DOUBLE_BRACKETS = re.compile(r"\[\[\s*([A-Za-z])\s*\]\]")
WORD = re.compile(r"[^\W_]+(?:[./'-][^\W_]+)*")


# --- letters ----------------------------------------------------------------------------------------------------------


def _unmarked(text: str) -> str:
    """Without Markdown's stars and LaTeX's fonts, and without quotes and the like at its start."""
    text = re.sub(r"\\(?:text|textbf|mathrm|mathbf)\s?\{([^{}]{0,99})\}", r"\1", text)
    return text.replace("*", "").lstrip("_` \"'$\u201c\u2018{")


def _opening_letter(text: str) -> str | None:
    """The letter that opens `text`: `(B)`, `B.`, `B)`, `B:`, `B`; not the article in `A force`, not one of `B or C`."""
    if DENIED.match(text):
        return None
    match = OPENING_LETTER.match(text)
    if match is None or DENIED_BEHIND.match(text, match.end()):
        return None

    letter = match[match.lastindex].upper()
    another = ANOTHER_LETTER.match(text, match.end())
    if another and another[another.lastindex].upper() != letter:
        return None
    return letter


def option_letter(text: str) -> str | None:
    r"""The letter of the option that a short answer names, without knowing the options; None: none, or not clear.

    A box or answer tag, `answer is B` and the like (the last counts), or a letter that opens the text.
    """
    text = before_next_question(text)
    marked = marked_answer(text)
    if marked is not None:
        text = marked
    if len(bare(text)) == 1 and bare(text).isalpha():
        return bare(text).upper()

    doubled = DOUBLE_BRACKETS.findall(text)
    if doubled:
        return doubled[-1].upper()
    for match in reversed(list(STATED.finditer(text))[-TRIES:]):
        rest = _unmarked(text[match.end() : match.end() + LONGEST])
        letter = _opening_letter(rest)
        if letter is not None or DENIED.match(rest):
            return letter
    return _opening_letter(_unmarked(text))


def _place_of(letter: str | None, count: int) -> int | None:
    """The place of the option that a letter names; None where there are not so many."""
    if letter is None:
        return None
    place = LETTERS.find(letter.upper())
    return place if 0 <= place < count else None


def _letter(text: str, count: int) -> int | None:
    """The option whose letter opens `text`."""
    return _place_of(_opening_letter(text), count)


# --- words of options -------------------------------------------------------------------------------------------------


def _words(text: str) -> str:
    """The words of a text in lower case, between single spaces."""
    return " ".join(WORD.findall(text.lower()))


def _holds(words: str, part: str) -> bool:
    """Whether the words of `part` stand together in `words`."""
    return f" {part} " in f" {words} "


def _named(text: str, choices: Sequence[str], whole: bool) -> int | None:
    """The one option whose words `text` is (`whole`) or holds; None where it is none or not clear.

    If a shorter option is part of a longer one that also matches, the longer one wins.
    """
    words = _words(text)
    options = [_words(choice) for choice in choices]
    places = []
    for place, option in enumerate(options):
        if option == words or (not whole and _holds(words, option)):
            places.append(place)

    if not whole:
        matching = {options[place] for place in places}
        places = [place for place in places if not _is_part(options[place], matching)]
    return places[0] if len(places) == 1 else None


def _is_part(option: str, options: set[str]) -> bool:
    """Whether an option is part of another one of `options`."""
    return any(option != other and _holds(other, option) for other in options)


def _verbatim(text: str, choices: Sequence[str]) -> int | None:
    """The longest option that `text` opens with to the letter: some differ in case or punctuation alone."""
    longest = None
    length = -1
    for place, choice in enumerate(choices):
        choice = choice.strip()
        goes_on = re.match(r"\w", text[len(choice) :])  # text opens with a longer word
        if text.startswith(choice) and not goes_on and len(choice) > length:
            longest = place
            length = len(choice)
    return longest


def _stated_option(rests: Sequence[str], choices: Sequence[str]) -> int | None:
    """The option that stands behind an announcement; `rests` are what follows each, in the order they are tried."""
    for rest in rests:
        place = _letter(_unmarked(rest), len(choices))
        if place is not None:
            return place

    for rest in rests:
        place = _verbatim(rest.lstrip(), choices)
        if place is None:
            line = STATED_END.split(rest.lstrip("*_` \"'"), maxsplit=1)[0]
            place = _named(line, choices, whole=True)
        if place is not None:
            return place
    return None


def choose_option(text: str, choices: Sequence[str]) -> int | None:
    r"""The place of the option that a generated answer gives, or None where it gives none or is not clear.

    Tried in this order: the last `\boxed{..}`, `<answer>..</answer>` or `[[B]]`; a letter after "answer is", "answer:"
    and the like, then the words of an option there (the last such place counts); a letter at the start; a text that
    opens with an option, or whose first line is one; the one option that the first line, then the whole text, names;
    the one letter in brackets. A question that the model goes on with does not count. Letters joined by "or", "and" or
    a slash, and one that is denied ("not B", "B is wrong"), name no option.
    """
    text = before_next_question(text)
    marked = marked_answer(text)
    doubled = DOUBLE_BRACKETS.findall(text)
    if marked is None and doubled:
        marked = doubled[-1]
    if marked is not None:
        text = marked
        if len(bare(text)) == 1 and bare(text).isalpha():
            return _place_of(bare(text), len(choices))
    elif re.fullmatch(r"[A-Z]", bare(text)):
        return _place_of(bare(text), len(choices))

    rests = [text[mark.end() : mark.end() + LONGEST] for mark in list(STATED.finditer(text))[-TRIES:]]
    place = _stated_option(rests[::-1], choices)
    if place is not None:
        return place

    # How the text begins.
    place = _letter(_unmarked(text), len(choices))
    if place is None:
        place = _verbatim(text.strip(), choices)
    if place is not None:
        return place

    # What it names at all.
    first_line = text.strip().partition("\n")[0]
    for part, whole in ((first_line, True), (first_line, False), (text, False)):
        place = _named(part, choices, whole)
        if place is not None:
            return place

    letters = {_place_of(letter, len(choices)) for letter in BRACKETED_LETTER.findall(text)} - {None}
    return letters.pop() if len(letters) == 1 else None
