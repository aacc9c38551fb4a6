"""Fields of a row that people wrote: a prompt, a message, an answer, each as text or refused with a reason."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from text_data.equality import same_answer

_CHAT_AS_TEXT = re.compile(r"\[?\s*\{\s*['\"](?:role|content)['\"]\s*:")
ROLES = {"human": "user", "gpt": "assistant"}  # other names of the roles of a chat


def prompt_text(value: Any, name: str) -> str:
    """The text of a prompt: as it is, or of a chat of one user turn, below what a system turn says before it."""
    if value is None:
        return ""
    if isinstance(value, str):
        text = value.replace("\r\n", "\n").strip()
        if not _CHAT_AS_TEXT.match(text):
            return text
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            raise ValueError(f"has a chat printed as text in its field {name}: write the chat, or its text") from None
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, list) or not all(isinstance(message, Mapping) for message in messages):
        raise ValueError(f"has neither text nor a chat in its field {name}: it is {type(value).__name__}")

    # More turns than one would lose who says what.
    roles = [message.get("role") for message in messages]
    if roles[-1:] != ["user"] or any(role != "system" for role in roles[:-1]):
        shown = ", ".join(map(str, roles)) or "nothing"
        raise ValueError(f"has a chat of {shown} in its field {name}: expected one user turn, or system and user")
    return "\n\n".join(filter(None, (content_text(message.get("content"), name) for message in messages)))


def content_text(content: Any, name: str) -> str:
    """The text of a message: text, or a list of parts that are text. Raises ValueError."""
    if isinstance(content, str):
        return content.strip()
    parts = content if isinstance(content, list) else [None]
    texts = []
    for part in parts:
        text = part.get("text") if isinstance(part, Mapping) else part
        if not isinstance(text, str):
            raise ValueError(f"has a part in its field {name} that is no text, which no model here can read")
        texts.append(text)
    return "\n".join(texts).strip()


def chat_texts(value: Any, name: str) -> tuple[str, str]:
    """(question, answer) of a chat: the last turn of the assistant is the answer, what precedes it the question.

    A question of one user turn is that turn, below what a system turn says. One of more turns names the speaker of
    each. Turns have `role` and `content`, or `from` and `value`; a chat may be JSON text.

    Raises:
        ValueError: no chat, or one without an answer; a clause that goes on from the row's place.
    """
    if isinstance(value, str):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(value)
    if not isinstance(value, list) or not value or not all(isinstance(turn, Mapping) for turn in value):
        raise ValueError(f"has no chat in its field {name}: expected a list of turns with role and content")

    # Roles by the names that are usual here.
    turns = []
    for turn in value:
        role = str(turn.get("role", turn.get("from")))
        turns.append((ROLES.get(role, role), content_text(turn.get("content", turn.get("value")), name)))

    last = max((place for place, (role, _) in enumerate(turns) if role == "assistant"), default=0)
    if not last:
        raise ValueError(f"has a chat without an assistant turn behind a question in its field {name}")

    # Who says what matters only where several speak.
    before = turns[:last]
    if sum(role != "system" for role, _ in before) == 1:
        question = "\n\n".join(text for _, text in before if text)
    else:
        question = "\n\n".join(f"{role}: {text}" for role, text in before if text)
    return question, turns[last][1]


def answer_text(value: Any, name: str) -> str:
    """An answer as text, "" for none. Raises ValueError where it has no obvious text."""
    if value is None:
        return ""
    if isinstance(value, str):
        return value.replace("\r\n", "\n").replace("\r", "\n").strip()
    if isinstance(value, bool):
        raise ValueError(f"has the {name} {str(value).lower()}: write the text that the model must give, such as yes")
    if isinstance(value, int) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if not isinstance(value, list) or not value:
        raise ValueError(f"has {kind_of(value)} in its field {name}: give text or a number")

    # Several ways to write one answer are one answer.
    texts = [answer_text(entry, name) for entry in value]
    if any(not same_answer(text, texts[0]) for text in texts):
        raise ValueError(f"has a list of {len(value)} different texts as its {name}: give the one that counts")
    return texts[0]


def kind_of(value: Any) -> str:
    """What a value is, for people."""
    kinds = {"dict": "an object", "list": "an empty list", "float": f"{value}"}
    return kinds.get(type(value).__name__, type(value).__name__)
