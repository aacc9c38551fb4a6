"""Reasoning tags in one place, and the parser of completions written with them.

A well-formed completion is `<think>THOUGHT</think><SOLUTION>SOLUTION</SOLUTION>` with white space between, and after it
nothing but white space and end-of-text marks.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

# A tokenizer must add these as ordinary tokens: decoding for rewards skips special ones, and the tags with them.
REASONING_TOKENS = (
    *("<think>", "</think>", "<plan>", "</plan>", "<work>", "</work>"),
    *("<SOLUTION>", "</SOLUTION>", "<REASONING>", "</REASONING>"),
)
THINK = "<think>"
END_THINK = "</think>"
SOLUTION = "<SOLUTION>"
END_SOLUTION = "</SOLUTION>"
# What models of the common families end or pad with, where a decoder left it in.
END_MARKS = (
    *("</s>", "<eos>", "<|eos|>", "<|endoftext|>", "<|end_of_text|>", "<|im_end|>", "<|eot_id|>", "<|end|>"),
    *("<end_of_turn>", "<pad>", "<|pad|>", "[PAD]"),
)
_NOTHING = re.compile(rf"(?:\s|{'|'.join(map(re.escape, END_MARKS))})*")
_TAG = re.compile("|".join(map(re.escape, REASONING_TOKENS)))
_MARK = re.compile("|".join(map(re.escape, (*REASONING_TOKENS, *END_MARKS))))


@dataclass(frozen=True)
class Parsed:
    """A completion's parts, stripped.

    Args:
        thought, solution: "" for a part that is missing, or that cannot be told from others like it.
        well_formed: whether the completion is exactly one thought and one solution, as the module's docstring says.
    """

    thought: str
    solution: str
    well_formed: bool


def split_completion(text: str) -> Parsed:
    """The parts of a completion, in time linear in its length.

    The thought is what stands between the first `<think>` and the next `</think>`, or the end. The solution is the one
    `<SOLUTION>` pair after it: none inside the thought counts, and of several none does.
    """
    before, opened, rest = text.partition(THINK)
    thought = closed = after = ""
    if opened:
        thought, closed, after = rest.partition(END_THINK)

    # The one solution, and what stands between thought and solution (lead) and behind it (tail).
    outside = before + after
    solution = lead = tail = ""
    is_single = outside.count(SOLUTION) == outside.count(END_SOLUTION) == 1
    if is_single and outside.index(SOLUTION) < outside.index(END_SOLUTION):
        lead, _, rest = outside.partition(SOLUTION)
        solution, _, tail = rest.partition(END_SOLUTION)
    thought = thought.strip()
    solution = solution.strip()

    # Well-formed: every tag once, both parts filled, nothing beside them.
    is_once = all(text.count(tag) == 1 for tag in (THINK, END_THINK, SOLUTION, END_SOLUTION))
    is_filled = bool(is_once and closed and thought and solution) and not _TAG.search(solution)
    is_alone = not before.strip() and not lead.strip() and _NOTHING.fullmatch(tail) is not None
    return Parsed(thought, solution, is_filled and is_alone)


def format_score(text: str) -> float:
    """1.0 for a well-formed completion; else 0.2 for one thought and one solution after it each, 0.3 if filled."""
    parsed = split_completion(text)
    if parsed.well_formed:
        return 1.0

    # Each part counts once it has exactly one pair of tags, in order, behind the part before it.
    score = 0.0
    start = 0
    for opening, closing, content in ((THINK, END_THINK, parsed.thought), (SOLUTION, END_SOLUTION, parsed.solution)):
        left = text.find(opening, start)
        right = text.find(closing, start)
        if text.count(opening) == text.count(closing) == 1 and 0 <= left < right:
            score += 0.3 if content else 0.2
            start = right
    return score


def format_rate(texts: Iterable[str]) -> float:
    """Share of well-formed completions; 0.0 of none."""
    verdicts = [split_completion(text).well_formed for text in texts]
    return sum(verdicts) / len(verdicts) if verdicts else 0.0


def without_tags(text: str) -> str:
    """The text with every reasoning tag and end mark replaced by a space."""
    return _MARK.sub(" ", text)
