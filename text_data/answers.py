"""Where an answer stands in a text: boxes and tags that hold it, marks around it, and what a model writes on after it.

The readers of numbers (`text_data.numbers`), options (`text_data.choices`) and texts share it.
"""

from __future__ import annotations

import re

MARK = "####"  # GSM8K writes its answer behind it
LONGEST_MARKED = 2_000  # characters of a box or tag that are read
TRIES = 20  # boxes that are looked at, from the last

_BOX = re.compile(r"\\f?boxed\s{0,3}\{")
_TAG = re.compile(r"<(/?)(?:answer|solution)>", re.I)
# Calculator marks of GSM8K: `<<48/2=24>>`.
CALCULATOR = re.compile(r"<<[^<>]*>>")
# A line that begins the next question of a text that goes on after its answer.
_NEXT_QUESTION = re.compile(r"\n[ \t]*(?:Q|Question|Problem|Exercise|Human|User)\s?\d{0,4}\s?:", re.I)
# How models end a turn, where it stands in the text as words.
_TURN_END = re.compile(r"<\|(?:endoftext|end_of_text|im_end|eot_id|eos|end)\|>|</s>|<(?:eos|end_of_turn)>")

# LaTeX that changes the look of a text alone, and Markdown's marks at its ends.
_DRESS = re.compile(r"\\(?:f?boxed|text|textbf|textit|mathrm|mathbf|mathit|mbox|left|right|displaystyle)(?![A-Za-z])")
_MARKDOWN = re.compile(r"\A(?:[*_`]{1,3}|\$\$?|\\\(|\\\[)(.+?)(?:[*_`]{1,3}|\$\$?|\\\)|\\\])\Z", re.S)
_SPACE_INSIDE = re.compile(r"\s+(?=[,)\]}])|(?<=[(\[{,])\s+")


def marked_answer(text: str) -> str | None:
    r"""What the last `\boxed{..}` holds, else the last `<answer>..</answer>`; None where there is neither."""
    boxed = boxed_answer(text)
    if boxed is not None:
        return boxed
    return tagged_answer(text)


def boxed_answer(text: str) -> str | None:
    r"""What the last `\boxed{..}` holds; None where there is none."""
    # The brace that closes a box stands at the depth of the one that opens it.
    for box in reversed(list(_BOX.finditer(text))[-TRIES:]):
        depth = 1
        for place in range(box.end(), min(box.end() + LONGEST_MARKED, len(text))):
            depth += (text[place] == "{") - (text[place] == "}")
            if depth == 0:
                return text[box.end() : place]
    return None


def tagged_answer(text: str) -> str | None:
    """What stands in the last `<answer>..</answer>` (or `<solution>`) that is opened and closed; None: in none."""
    answer = None
    start = None
    for tag in _TAG.finditer(text):
        if tag[1] and start is not None:
            answer = text[start : tag.start()]
        start = None if tag[1] else tag.end()
    return answer


def before_turn_end(text: str) -> str:
    """The text up to the mark that ends a turn, such as `<|im_end|>`."""
    return _TURN_END.split(text, maxsplit=1)[0]


def before_next_question(text: str) -> str:
    """The text up to the end of its turn or the line `Question:` with which a model goes on.

    A text that begins with such a line stays as it is.
    """
    text = before_turn_end(text)
    for match in _NEXT_QUESTION.finditer(text):
        if text[: match.start()].strip():
            return text[: match.start()]
    return text


def without_calculator(text: str) -> str:
    """The text without GSM8K's marks for a calculator that runs beside the model."""
    return CALCULATOR.sub("", text)


def gold_of(answer: str) -> str:
    """The gold answer proper: what stands behind the last `####`, where something does; stripped."""
    before, mark, behind = answer.rpartition(MARK)
    if mark and not behind.strip():
        return before.strip()
    return behind.strip()


def bare(text: str) -> str:
    r"""The answer without what only dresses it: a box, a tag, LaTeX's fonts, Markdown, quotes, a trailing point."""
    marked = marked_answer(text)
    if marked is not None:
        text = marked
    text = _DRESS.sub("", text).strip()

    # Marks may be nested: **`Paris`**. Each turn takes off one layer at least.
    for _ in range(8):
        layer = text
        match = _MARKDOWN.match(text)
        if match:
            text = match[1].strip()
        for opening, closing in ('""', "''", "{}", "\u201c\u201d", "\u2018\u2019"):
            if len(text) > 2 and text.startswith(opening) and text.endswith(closing):
                text = text[1:-1].strip()
        if text.endswith(".") and not text.endswith(".."):
            text = text[:-1].rstrip()
        if text == layer:
            break
    return text


def same_text(text: str, gold: str) -> bool:
    """Whether two texts are equal up to what `bare` takes off, case and white space; an empty one equals none."""
    left, right = (_SPACE_INSIDE.sub("", " ".join(bare(part).casefold().split())) for part in (text, gold))
    return bool(right) and left == right
