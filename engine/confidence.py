"""How sure a model is of the answer that it generates: the probability of its tokens, counted while it decodes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import LogitsProcessor


class Confidence(LogitsProcessor):
    """Watches greedy decoding and changes nothing: it keeps the log probability of each step's likeliest token.

    It is the last processor that `generate` calls, so it sees the logits that the choice is made from. What it keeps is
    one number for each row and token.
    """

    def __init__(self) -> None:
        self._steps: list[Tensor] = []  # (B,) for each generated token

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """`scores` (B, V) as they came."""
        logits = scores.float()
        chances = (logits.amax(dim=-1) - logits.logsumexp(dim=-1)).clamp(max=0)
        self._steps.append(chances.nan_to_num(-torch.inf, neginf=-torch.inf))  # greedy decoding passes over a NaN
        return scores

    def of(self, lengths: Sequence[int]) -> list[float]:
        """The probability of each row's first tokens, as many as `lengths` says."""
        steps = torch.stack(self._steps, dim=1).double().cpu()
        return [float(row[:length].sum().exp()) for row, length in zip(steps, lengths, strict=True)]
