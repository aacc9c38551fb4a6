"""Rewards of the user's own: `PKG.MOD:FUNCTION` in the `rewards` of a stage, with TRL's signature."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from own_tasks.functions import imported

Reward = Callable[..., list[float]]


def is_own(name: Any) -> bool:
    """Whether the name of a reward stands for a function of the user's."""
    return isinstance(name, str) and ":" in name


def own_reward(name: str, text_of: Callable[[Any], str]) -> Reward:
    """The user's function as a reward: it is given prompts and completions as plain texts, and columns by name.

    A completion for which it returns None or NaN earns 0.

    Args:
        name: `PKG.MOD:FUNCTION`.
        text_of: the text of a prompt or completion, which TRL hands in as a chat.

    Raises:
        ValueError: one line: it cannot be imported; when it is called: it raises, or returns no list of numbers.
    """
    function = imported(name, "reward")

    def reward(prompts, completions, completion_ids=None, **columns) -> list[float]:
        columns.pop("settings", None)
        questions = [text_of(prompt) for prompt in prompts]
        texts = [text_of(completion) for completion in completions]

        # A reward that fails would otherwise end training with a traceback.
        try:
            given = function(prompts=questions, completions=texts, completion_ids=completion_ids, **columns)
        except Exception as error:  # noqa: BLE001 - a user's function raises what it likes
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"reward {name} raises ({reason}): it is called as f(prompts=, completions=, **columns), "
                             "and must take every keyword") from error
        return _checked(name, given, len(texts))

    reward.__name__ = reward.__qualname__ = name
    reward.__doc__ = function.__doc__
    return reward


def _checked(name: str, given: Any, count: int) -> list[float]:
    """The values that a reward returned. Raises ValueError."""
    try:
        values = [0.0 if value is None else float(value) for value in given]
    except (TypeError, ValueError):
        values = []

    if len(values) != count:
        raise ValueError(f"reward {name} returned {_shown(given)}: expected a list of {count} numbers")
    if any(math.isinf(value) for value in values):
        raise ValueError(f"reward {name} returned an infinite number: expected finite ones, such as 0 to 1")
    return [0.0 if math.isnan(value) else value for value in values]


def _shown(given: Any) -> str:
    """What was returned, in a few words."""
    if isinstance(given, Sequence) and not isinstance(given, str):
        return f"{len(given)} values"
    return type(given).__name__


def try_reward(name: str, row: Mapping[str, Any], text_of: Callable[[Any], str]) -> str | None:
    """What is wrong with a reward of the user's, found by calling it on one problem; None where all is well."""
    columns = {key: [value] for key, value in row.items() if key != "prompt"}
    try:
        own_reward(name, text_of)([row["prompt"]], [row["answer"]], None, **columns)
    except ValueError as error:
        return str(error)
    return None
