"""What identifies a question in the records of every run, whatever system answered it."""

from __future__ import annotations

import hashlib


def normalise(question: str) -> str:
    """The form in which questions are compared: lower case, runs of white space as one space."""
    return " ".join(question.lower().split())


def question_hash(question: str) -> str:
    """First 16 hex digits of the SHA-256 of the normalised question, UTF-8."""
    return hashlib.sha256(normalise(question).encode()).hexdigest()[:16]
