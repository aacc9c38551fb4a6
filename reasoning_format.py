"""The reasoning format: the tags that mark thinking, planning, working and the solution in a model's text."""

from __future__ import annotations

# fmt: off
REASONING_TOKENS = (
    "<think>", "</think>", "<plan>", "</plan>", "<work>", "</work>", "<SOLUTION>", "</SOLUTION>",
    "<REASONING>", "</REASONING>",
)
# fmt: on
