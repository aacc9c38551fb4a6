"""HRM over banks of tokens: the core that thinks about the encoder's states, the bridge and the gate to the decoder.

Shapes: B batch, S encoder tokens, D width of encoder and decoder, d HRM width, h heads, H and L slots of the slow and
the fast bank, m memory tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.attention import rope
from hrm_blocks import HALT_BIAS, HBlock, LBlock, first_call_with_gradient, linear, recur, rms_norm
from hybrid.layers import CrossAttention, Keys

SLOT_DEVIATION = 0.5  # of slot embeddings, beside states of deviation 1


@dataclass
class CycleState:
    """What one cycle left: the slow bank and the logit of "this is enough"."""

    z_high: Tensor  # (B, H, d)
    halt_logits: Tensor  # (B,)


class BankContext:
    """The context of a bank for `hrm_blocks.Attention`: every slot is readable.

    `turn` is the cosine and sine (1, slots, d / h) of the slots' places.
    """

    keys = None

    def __init__(self, turn: tuple[Tensor, Tensor]):
        self.cos, self.sin = turn


class BankCore(nn.Module):
    """HRM (arXiv 2506.21734, section 2) whose states are banks of tokens, whatever the length of the input.

    A cycle is `l_steps` times `l = z_L + s_L; z_L = L(l + x(l) + read_high(l))` with `x = read_input`, then
    `h = z_H + s_H; z_H = H(h + read_low(h))`.

    Each read is cross-attention with a norm behind it, so that what is read weighs as much as the state that reads.
    Without the norm it would weigh little, because attention over a hundred tokens is nearly their mean, and z_H would
    soon be the same for every input.

    s are learned slot embeddings. HRM's x tells its positions apart in each call; without something like it all slots
    of a bank come to hold one vector.

    Each cycle is a segment: with a horizon other than `full` its state is handed on detached. Initial states are fixed
    vectors, one per slot (truncated normal, deviation 1), saved and not trained.

    Args:
        d: width of the banks.
        heads: of every attention; they divide d.
        width: D, of the encoder's states.
        h_len: H, slots of the slow bank.
        l_len: L, slots of the fast bank.
        h_layers: layers of the slow block.
        l_layers: layers of the fast block.
        h_cycles: cycles of one example, at most.
        l_steps: L steps of a cycle.
        horizon: which calls of a cycle carry gradient, see `hrm_blocks.first_call_with_gradient`.

    Raises:
        ValueError: an unknown horizon.
    """

    def __init__(
        self,
        d: int,
        heads: int,
        width: int,
        h_len: int,
        l_len: int,
        h_layers: int,
        l_layers: int,
        h_cycles: int,
        l_steps: int,
        horizon: str,
    ):
        super().__init__()
        first_call_with_gradient(horizon, l_steps)  # raises for an unknown horizon
        self.head_dim = d // heads
        self.h_cycles = h_cycles
        self.l_steps = l_steps
        self.horizon = horizon

        self.h_block = HBlock(d, heads, h_layers)
        self.l_block = LBlock(d, heads, l_layers)
        self.read_high = CrossAttention(d, d, heads)
        self.read_low = CrossAttention(d, d, heads)
        self.read_input = CrossAttention(d, width, heads)

        # The head halts nothing at first.
        self.halt = nn.Linear(d, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, HALT_BIAS)

        # Buffers, because initial states are saved and not trained.
        for name, slots in (("z_high_init", h_len), ("z_low_init", l_len)):
            self.register_buffer(name, nn.init.trunc_normal_(torch.empty(slots, d), std=1.0, a=-2.0, b=2.0))
        self.high_slots = nn.Parameter(SLOT_DEVIATION * torch.randn(h_len, d))
        self.low_slots = nn.Parameter(SLOT_DEVIATION * torch.randn(l_len, d))

    def start(self, batch: int) -> tuple[Tensor, Tensor]:
        """(z_high, z_low) before the first cycle, (B, H, d) and (B, L, d)."""
        return self.z_high_init.expand(batch, -1, -1), self.z_low_init.expand(batch, -1, -1)

    def read(self, states: Tensor) -> Keys:
        """Keys and values of the encoder's states (B, S, D), once for all cycles."""
        return self.read_input.keys(states)

    def cycle(self, z_high: Tensor, z_low: Tensor, source: Keys, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """One cycle.

        Args:
            z_high: (B, H, d).
            z_low: (B, L, d).
            source: from `read`.
            mask: from `key_mask`, of the encoder's tokens.

        Returns:
            (z_high, z_low), shapes as given.
        """
        if self.horizon != "full":
            z_high = z_high.detach()
            z_low = z_low.detach()

        high_context = self._context(z_high)
        low_context = self._context(z_low)

        # The two steps as `recur` calls them; each hears the other bank, and only L hears the input.
        def step_low(low: Tensor, high: Tensor) -> Tensor:
            low = low + self.low_slots
            x = rms_norm(self.read_input(low, source, mask))
            state = low + x
            heard = rms_norm(self.read_high(low, self.read_high.keys(high)))
            return self.l_block(state + heard, low_context)

        def step_high(high: Tensor, low: Tensor) -> Tensor:
            high = high + self.high_slots
            heard = rms_norm(self.read_low(high, self.read_low.keys(low)))
            return self.h_block(high + heard, high_context)

        return recur(step_low, step_high, z_high, z_low, self.l_steps, horizon=self.horizon)

    def _context(self, bank: Tensor) -> BankContext:
        """The slots' places, 0 to their number, for attention inside the bank (B, slots, d)."""
        places = torch.arange(bank.shape[1], device=bank.device)[None]
        return BankContext(rope(places, self.head_dim))

    def halt_logits(self, z_high: Tensor) -> Tensor:
        """(B,) from the mean of the slow bank (B, H, d).

        The head only reads the bank: no gradient goes on. Optimizers that normalise gradients would let the head's
        small loss reshape the whole bank wherever the gate is nearly shut.
        """
        return self.halt(z_high.detach().mean(dim=1)).squeeze(-1)


class Bridge(nn.Module):
    """z_H (B, H, d) to the memory that the decoder reads, (B, m, D).

    `prefix`: m learned queries read the bank. `cross_attn`: the bank's mean is one memory vector.
    """

    def __init__(self, kind: str, d: int, heads: int, width: int, prefix_len: int):
        super().__init__()
        self.kind = kind
        if kind == "prefix":
            self.queries = nn.Parameter(torch.randn(prefix_len, d))
            self.read = CrossAttention(d, d, heads)
        self.out = linear(d, width)

    def forward(self, z_high: Tensor) -> Tensor:
        if self.kind == "cross_attn":
            return self.out(z_high.mean(dim=1, keepdim=True))
        queries = self.queries.expand(len(z_high), -1, -1)
        return self.out(rms_norm(queries + self.read(queries, self.read.keys(z_high))))


class Gate(nn.Module):
    """(B,) in (0, 1): how much of the memory an example lets in, from z_H's mean and the encoder's pooled state (B, D).

    The features are divided by the root of their number: Adam moves every weight by the learning rate, and their sum
    would otherwise shut the gate for good in the first ten steps, while the memory is still noise.
    """

    def __init__(self, d: int, width: int):
        super().__init__()
        self.score = nn.Linear(d + width, 1)
        nn.init.zeros_(self.score.weight)
        nn.init.zeros_(self.score.bias)

    def forward(self, z_high: Tensor, pooled: Tensor) -> Tensor:
        features = torch.cat([z_high.mean(dim=1), pooled], dim=-1) * self.score.in_features**-0.5
        return self.score(features).squeeze(-1).sigmoid()
