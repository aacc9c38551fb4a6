"""How the evaluation suite sees a model: text in, text out, and the likelihood of text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Cuts:
    """What a call did not read or did not let the model say, for each question in order.

    questions: whether the question (of likelihoods, the context) lost its beginning.
    answers: whether the limit of tokens ended the answer; empty for likelihoods.
    """

    questions: tuple[bool, ...] = ()
    answers: tuple[bool, ...] = ()


class TextModel(Protocol):
    """All that the suite knows of a model.

    segments_used: mean HRM segments of the latest call, None without HRM.
    cuts: what the latest call cut. A model without it is asked, and nothing is told of cuts.
    """

    segments_used: float | None
    cuts: Cuts

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
