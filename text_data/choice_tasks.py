"""Multiple-choice questions as data sets give them: the builder's rows and ScienceQA's published form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from text_data.choices import LETTERS


@dataclass(frozen=True)
class ChoiceTask:
    """A question with options.

    Args:
        prompt: the question, below it the options with their letters.
        choices: the options.
        right: the place of the right one.
        rationale: why it is, "" where nobody wrote it.
    """

    prompt: str
    choices: tuple[str, ...]
    right: int
    rationale: str = ""

    @property
    def letter(self) -> str:
        """The letter of the right option."""
        return LETTERS[self.right]


def text_of(row: Mapping[str, Any], name: str, required: bool = False) -> str:
    """The text of a field, "" where there is none. Raises ValueError: no text, or an empty one that is required."""
    value = row.get(name)
    if required and (not isinstance(value, str) or not value.strip()):
        raise ValueError(f"{name} must be non-empty text")
    if not isinstance(value, str | None):
        raise ValueError(f"{name} must be text")
    return (value or "").replace("\r\n", "\n")


def has_choices(row: Mapping[str, Any]) -> bool:
    """Whether a row is a multiple-choice question."""
    return "choices" in row


def needs_image(row: Mapping[str, Any]) -> bool:
    """Whether a row is a published question about an image: no text answers it."""
    return "prompt" not in row and bool(row.get("image"))


def read_choice_task(row: Mapping[str, Any]) -> ChoiceTask:
    """The question of a row of the builder, or of ScienceQA's published form. Raises ValueError."""
    choices = row.get("choices")
    if not isinstance(choices, list) or len(choices) < 2 or not all(isinstance(choice, str) for choice in choices):
        raise ValueError("choices must be a list of at least 2 texts")
    choices = tuple(choice.replace("\r\n", "\n") for choice in choices)

    # A bool is an int to isinstance, and no place.
    right = row.get("answer_index", row.get("answer"))
    if type(right) is not int or not 0 <= right < len(choices) <= len(LETTERS):
        raise ValueError(f"answer_index must be a choice's place, 0 to {len(choices) - 1}")
    if "prompt" in row:
        return ChoiceTask(text_of(row, "prompt", required=True), choices, right, text_of(row, "rationale"))

    # The published form: hint, question and options make the prompt, lecture and solution the rationale.
    options = [f"({letter}) {choice.strip()}" for letter, choice in zip(LETTERS, choices, strict=False)]
    prompt = _joined(text_of(row, "hint").strip(), text_of(row, "question", required=True).strip(), *options)
    rationale = _joined(text_of(row, "lecture").strip(), text_of(row, "solution").strip())
    return ChoiceTask(prompt, choices, right, rationale)


def _joined(*parts: str) -> str:
    """The parts that are not empty, one below the other."""
    return "\n".join(filter(None, parts))
