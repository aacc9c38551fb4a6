"""How the evaluation suite sees a model: text in, text out, and the likelihood of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol


class TextModel(Protocol):
    """All that the suite knows of a model.

    segments_used: mean HRM segments of the latest call, None without HRM.
    """

    segments_used: float | None

    def generate(
        self, prompts: Sequence[str], max_new_tokens: int, progress: Callable[[int], None] = lambda done: None
    ) -> list[str]:
        """The greedy answer to each prompt, in its order, of at most `max_new_tokens` tokens.

        `progress` is called with the number of prompts that are answered.
        """

    def log_likelihoods(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, int]]:
        """(sum of log p(continuation | context) in nats, continuation tokens) of each (context, continuation).

        A token is predicted from the context and the continuation's earlier tokens alone.
        """
