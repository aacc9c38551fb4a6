"""`SinglePassCore`: HRM's blocks without HRM's recurrence, what `--adapter mlp` trains in its place.

    HRM:          z_L = L(z_L + z_H + x) inner_T times, z_H = H(z_H + z_L), for every segment, from initial states
    single pass:  z_L = L(x), z_H = H(z_L), once

Reading, injection and both blocks are HRM's; there is no initial state, no sum with an earlier state, no gate, no loop
and no segment. It is an encoder of l_layers + h_layers layers between reading and injection.
Shapes: B batch, S prompt tokens, d width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hrm_blocks import Carry, Context, HRMCore


class SinglePassCore(HRMCore):
    """As `HRMCore`, whose arguments it takes; those of the recurrence have no effect."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"state_mix": "sum"})  # no gates: there is no earlier state
        del self.z_high_init, self.z_low_init

    def initial_carry(self, mask: Tensor) -> Carry:
        """An empty state, which nothing reads, for a batch with mask (B, S)."""
        nothing = torch.zeros(1, 1, self.d, device=mask.device).expand(*mask.shape, self.d)
        steps = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        return Carry(nothing, nothing, steps, steps.bool())

    def forward(self, x: Tensor, context: Context, carry: Carry) -> Carry:
        """The pass over x (B, S, d); whatever state comes in, the same one goes out."""
        z_low = self.l_block(x, context)
        return Carry(self.h_block(z_low, context), z_low, carry.steps + 1, carry.halted)
