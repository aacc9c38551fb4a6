"""How answers are decoded: what every system's evaluation and `generate.py` take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from engine.placement import ONE_DEVICE, SpreadConfig


@dataclass(frozen=True)
class Decoding:
    """How answers are decoded.

    temperature: of sampling; 0 = greedy, whatever top_p and top_k say.
    top_p: sample among the likeliest tokens that hold this probability together, above 0; 1 = among all.
    top_k: sample among so many of the likeliest tokens; 0 = among all.
    max_new_tokens: longest answer; 0 = the longest gold target plus `TARGET_MARGIN`.
    batch_size: questions that are answered together.
    seed: of the random numbers of one call of `answer`.
    item_segments: each item has as many of HRM's segments as it needs steps, where its task says how many, within the
        model's number.
    confidence: the answers know the probability that the model gave their tokens; of greedy decoding alone.

    Raises:
        ValueError: confidence of sampled answers.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 0
    batch_size: int = 128
    seed: int = 0
    item_segments: bool = False
    confidence: bool = False

    def __post_init__(self) -> None:
        if self.confidence and self.temperature:
            raise ValueError("confidence is the probability of the likeliest tokens: it goes with temperature 0 alone")

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for `generate`; every sampling field is set, so no host default sneaks in."""
        arguments: dict[str, Any] = {"num_beams": 1, "repetition_penalty": 1.0, "no_repeat_ngram_size": 0}
        if self.temperature == 0:
            # transformers' own values of the fields that greedy decoding does not read: others make it warn.
            return arguments | {"do_sample": False, "temperature": 1.0, "top_p": 1.0, "top_k": 50}

        # Greedy decoding passes over a logit that is no number; sampling would end the program.
        sampling = {"temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k}
        sampling["remove_invalid_values"] = True
        return arguments | {"do_sample": True} | sampling


@dataclass(frozen=True)
class Generated:
    """A generated text.

    text: the answer, without its end.
    finished: False where it was cut off by the limit of tokens.
    tokens: its tokens, the one that ended it included.
    confidence: their probability, where `Decoding` asks for it.
    """

    text: str
    finished: bool
    tokens: int
    confidence: float | None = None


@dataclass(frozen=True)
class AnswerConfig:
    """How `generate.py` puts questions to a checkpoint.

    decoding: how answers are generated, and their greatest length in tokens.
    eval_segments: HRM segments or cycles of an answer; 0 = as trained.
    compare: also answer with what the model is compared with.
    trust_remote_code: run Python code that comes with a hub model.
    spread: over which devices, memory and disk an add-on's LLM lies.
    """

    decoding: Decoding = Decoding()
    eval_segments: int = 0
    compare: bool = False
    trust_remote_code: bool = False
    spread: SpreadConfig = ONE_DEVICE


def answer_length(ids: Sequence[int], ends: Collection[int]) -> int:
    """Tokens of generated `ids` before the first of `ends`; all of them where there is none."""
    for place, index in enumerate(ids):
        if index in ends:
            return place
    return len(ids)


def generated_length(ids: Sequence[int], ends: Collection[int], pad_id: int) -> int:
    """Tokens of a generated row, its end included, without the padding behind a row that a stop string ended."""
    before = answer_length(ids, ends)
    if before < len(ids):
        return before + 1
    while before > 1 and ids[before - 1] == pad_id:
        before -= 1
    return before
