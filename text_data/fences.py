"""Code inside Markdown fences: the one place that knows how a fence is written."""

from __future__ import annotations

import re

FENCE = "```"
# A fence begins a line; a block that is cut off ends with the text.
_BLOCK = re.compile(rf"^[ \t]*{FENCE}[^\n`]*\n(.*?)(?:^[ \t]*{FENCE}|\Z)", re.DOTALL | re.MULTILINE)


def first_block(text: str) -> str:
    """The code of the first fenced block, closed or cut off; a text without a fence as it is."""
    block = _BLOCK.search(text)
    return block[1] if block else text


def without_outer_fence(text: str) -> str:
    """The text without the fence that it opens and ends with; a text that does not open with one as it is.

    Unlike `first_block`, it keeps everything in between, fences too: for text that is code from end to end.
    """
    stripped = text.strip()
    if not stripped.startswith(FENCE):
        return text
    return stripped.partition("\n")[2].rstrip().removesuffix(FENCE)
