"""The halting head: whether the answer that a state gives is right."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from engine.positions import last_state, relative_change

HALT_BIAS = -5.0  # a bias near 0 halts every example at once and fails most runs (arXiv 2604.21999)
SEES = ("state", "change")
STILL = 1e-6  # a smaller share of change counts as this one


class HaltHead(nn.Linear):
    """One logit of "this answer is right" for each example, of a state of width `d`.

    `sees` says what it reads:

        state   z_H at the last readable column, as published; column 0 may be a pad
        change  that, and by how much the segment changed z_H as a whole, in half powers of two: a loop that follows
                steps moves while there is one to take, and its last column need not show it
    """

    def __init__(self, d: int, sees: str = "state"):
        super().__init__(d + (sees == "change"), 1)
        self.sees = sees
        nn.init.zeros_(self.weight)
        nn.init.constant_(self.bias, HALT_BIAS)

    def logits(self, z_high: Tensor, mask: Tensor, before: Tensor | None = None) -> Tensor:
        """(B,) logits of z_high (B, S, d) under mask (B, S); `before`, z_H a segment earlier, is read for `change`."""
        state = last_state(z_high, mask)
        if self.sees == "change":
            assert before is not None, "the halting head sees what a segment changed"
            change = relative_change(before, z_high, mask).detach().clamp(min=STILL)
            state = torch.cat([state, -2 * change.log2()[:, None].to(state.dtype)], dim=-1)
        return self(state).squeeze(-1)
