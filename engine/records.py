"""What the records of every run share: how a value is written, and what identifies a question."""

from __future__ import annotations

import hashlib
import math
from typing import Any


def plain(value: Any) -> Any:
    """A value that JSON can hold: tensors and numpy scalars of one element become numbers, NaN and infinity None.

    Dicts and lists are taken apart; what is left and unknown becomes its text.
    """
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [plain(entry) for entry in value]
    if not isinstance(value, str | int | float | bool | None):
        value = value.item() if hasattr(value, "item") else str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def is_finite(value: object) -> bool:
    """Whether the value is a number that a float can hold: neither NaN, infinity nor an integer beyond both."""
    if not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def normalise(question: str) -> str:
    """The form in which questions are compared: lower case, runs of white space as one space."""
    return " ".join(question.lower().split())


def question_hash(question: str) -> str:
    """First 16 hex digits of the SHA-256 of the normalised question, UTF-8."""
    return hashlib.sha256(normalise(question).encode()).hexdigest()[:16]
