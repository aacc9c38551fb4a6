"""Code inside Markdown fences: the one place that knows how a fence is written."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass

# A fence: three or more backticks or tildes that begin a line, or end one that opens a block.
_OPENING = re.compile(r"^(?P<lead>[^`~\n]*)(?P<fence>`{3,}|~{3,})(?P<info>[^`\n]*)$")
_MARGIN = re.compile(r"[ \t>]*(?:[-*+] |\d{1,3}[.)] )?")
_WORD = re.compile(r"[ \t]*([A-Za-z][\w+#.-]*)[ \t]*(.*)", re.DOTALL)
_ATTRIBUTES = re.compile(r"(?:\{.*\}|[\w-]+=.*|\w*:\S*|[\w./-]+\.py)?\s*")
# One line that opens and closes: ```python x = 1```.
_INLINE = re.compile(r"^[ \t]*(`{3,}|~{3,})([^`\n]+)\1[ \t]*$")
PYTHON = frozenset(("python", "python3", "py", "py3", "ipython", "pycon", "cpython", "sage"))
_NO_LANGUAGE = frozenset("def class import from return if for while try with print async".split())
TRIES = 20  # closing fences that are tried for one block


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Args:
        code: its lines.
        language: its language in lower case, "" where none is named.
        is_python: whether it may be Python: it says so, or it names no language and parses.
    """

    code: str
    language: str
    is_python: bool


def fenced_blocks(text: str, parses: Callable[[str], bool]) -> list[Block]:
    """The blocks of a text in order, closed or cut off by its end.

    Args:
        text: with line ends `\\n`.
        parses: whether a text is Python. Where the code up to a closing fence does not parse and that up to a later one
            does, the later one closes the block: a fence may stand in a docstring.
    """
    lines = text.split("\n")
    blocks = []
    place = 0
    while place < len(lines):
        line = lines[place]
        place += 1
        inline = _INLINE.match(line)
        if inline:
            language, glued = _language(inline[2])
            blocks.append(_block(glued, language, parses))
            continue

        # Behind prose a fence opens a block only where it names Python.
        opening = _OPENING.match(line)
        if opening is None:
            continue
        language, glued = _language(opening["info"])
        if not _MARGIN.fullmatch(opening["lead"]) and language not in PYTHON:
            continue
        code, place = _body(lines, place, opening, glued, parses)
        blocks.append(_block(code, language, parses))
    return blocks


def _language(info: str) -> tuple[str, str]:
    """(language in lower case or "", code that is glued to the fence or "") of what follows an opening fence."""
    match = _WORD.match(info)
    if match is None:
        return "", info.strip() if info.strip() and not _ATTRIBUTES.fullmatch(info.strip()) else ""
    word = match[1].lower()
    if word in _NO_LANGUAGE:
        return "", info.strip()
    if _ATTRIBUTES.fullmatch(match[2]):
        return word, ""
    return (word, match[2].strip()) if word in PYTHON else ("", info.strip())


def _body(
    lines: list[str], start: int, opening: re.Match[str], glued: str, parses: Callable[[str], bool]
) -> tuple[str, int]:
    """(the code of the block whose first line is `start`, the line behind it)."""
    fence = opening["fence"]
    closing = re.compile(rf"^(.*?)[ \t>]*{re.escape(fence[0])}{{{len(fence)},}}[ \t]*$")
    head = [glued] if glued else []
    first: tuple[str, int] | None = None
    tries = 0
    for place in range(start, len(lines)):
        match = closing.match(lines[place])
        if match is None:
            continue

        # Code may end on the line of its fence.
        end = [match[1]] if match[1].strip() else []
        code = "\n".join([*head, *lines[start:place], *end]) + "\n"
        if first is None:
            first = (code, place + 1)
        if parses(textwrap.dedent(code)):
            return code, place + 1
        tries += 1
        if tries >= TRIES:
            break
    if first is not None:
        return first
    return "\n".join([*head, *lines[start:]]), len(lines)


def _block(code: str, language: str, parses: Callable[[str], bool]) -> Block:
    is_python = language in PYTHON or (not language and bool(code.strip()) and parses(textwrap.dedent(code)))
    return Block(code, language, is_python)


def without_lone_fence(text: str) -> str:
    """The text up to a closing fence that nothing opened: `CODE` then a fence then prose; else the text as it is."""
    lines = text.split("\n")
    for place, line in enumerate(lines):
        opening = _OPENING.match(line)
        if opening and opening["info"].strip():
            return text
        if re.fullmatch(r"[ \t]*(?:`{3,}|~{3,})[ \t]*", line) and any(each.strip() for each in lines[:place]):
            return "\n".join(lines[:place]) + "\n"
        glued = re.fullmatch(r"(.*\S)[ \t]*`{3,}[ \t]*", line)
        if glued:
            return "\n".join([*lines[:place], glued[1]]) + "\n"
    return text
