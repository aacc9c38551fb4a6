"""What recurs: norms, attention, `HBlock`, `LBlock`, `Carry`, the recurrence, its gradient horizon, the halting head.

Follows Hierarchical Reasoning Model (arXiv 2506.21734, section 2): a fast state z_L and a slow state z_H over the same
positions, `z_L = L(z_L + z_H + x)` inner_T times, then `z_H = H(z_H + z_L)` once per segment; x enters L only.
Shapes: B batch, S prompt tokens, d HRM width, h heads, e = d / h.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from engine.attention import attend, key_mask, rope, rotate
from engine.positions import last_state

NORM_EPS = 1e-5
HALT_BIAS = -5.0  # a bias near 0 halts every example at once and fails most runs (arXiv 2604.21999)


@dataclass
class Carry:
    """The recurrent state that is handed from segment to segment; never stored on a module."""

    z_high: Tensor  # (B, S, d) slow state
    z_low: Tensor  # (B, S, d) fast state
    steps: Tensor  # (B,) int64, segments used
    halted: Tensor  # (B,) bool

    def detach(self) -> Carry:
        """The same state without its graph: each segment of deep supervision is a training step of its own."""
        return Carry(self.z_high.detach(), self.z_low.detach(), self.steps, self.halted)

    def rows(self, index: Tensor) -> Carry:
        """The state of the examples that `index` (bool or int, (B,)) selects."""
        return Carry(self.z_high[index], self.z_low[index], self.steps[index], self.halted[index])

    def noisy(self, share: float) -> Carry:
        """The same state and Gaussian noise, at each position with `share` of the state's root mean square there."""

        def blurred(z: Tensor) -> Tensor:
            scale = share * z.detach().square().mean(dim=-1, keepdim=True).sqrt()
            return z + scale * torch.randn_like(z)

        return Carry(blurred(self.z_high), blurred(self.z_low), self.steps, self.halted)

    def where(self, chosen: Tensor, other: Carry) -> Carry:
        """The state of the examples that `chosen` (bool, (B,)) marks, and `other` in the other rows."""
        rows = chosen[:, None, None]

        z_high = torch.where(rows, self.z_high, other.z_high)
        z_low = torch.where(rows, self.z_low, other.z_low)
        return Carry(z_high, z_low, torch.where(chosen, self.steps, other.steps), self.halted)


@dataclass
class Context:
    """What every block call of a batch shares: who may be read, where each position lies, who still thinks."""

    mask: Tensor  # (B, S) bool, True at readable positions
    cos: Tensor  # (B, S, e)
    sin: Tensor  # (B, S, e)
    needed: Tensor | None = None  # (B,) int64, segments after which a row's state stays as it is; None = no limit
    keys: Tensor | None = field(init=False)  # (B, 1, 1, S) mask for attention

    def __post_init__(self) -> None:
        self.keys = key_mask(self.mask)

    def rows(self, index: Tensor) -> Context:
        """The context of the examples that `index` selects."""
        needed = None if self.needed is None else self.needed[index]
        return Context(self.mask[index], self.cos[index], self.sin[index], needed)


# --- layers -----------------------------------------------------------------------------------------------------------


def rms_norm(x: Tensor) -> Tensor:
    """RMSNorm without weight over the last axis; any shape."""
    return F.rms_norm(x, x.shape[-1:], eps=NORM_EPS)


def init_linear(linear: nn.Linear) -> nn.Linear:
    """Truncated normal (two deviations) with deviation 1/sqrt(fan_in), as HRM; about 1.7 times torch's default."""
    deviation = linear.in_features**-0.5
    nn.init.trunc_normal_(linear.weight, std=deviation, a=-2 * deviation, b=2 * deviation)
    if linear.bias is not None:
        nn.init.zeros_(linear.bias)
    return linear


def linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A bias-free projection with HRM's initialisation."""
    return init_linear(nn.Linear(fan_in, fan_out, bias=False))


def zero_linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A bias-free projection that starts at zero: the branch behind it changes nothing at first."""
    projection = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.zeros_(projection.weight)
    return projection


class Attention(nn.Module):
    """Bidirectional multi-head self-attention with RoPE and a padding mask. (B, S, d) -> (B, S, d)."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = linear(d, 3 * d)
        self.out = linear(d, d)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        qkv = rearrange(self.qkv(x), "B S (three h e) -> three B h S e", three=3, h=self.heads)
        query, key = rotate(qkv[:2], context.cos, context.sin)

        mixed = attend(query, key, qkv[2], context.keys)
        return self.out(rearrange(mixed, "B h S e -> B S (h e)"))


class SwiGLU(nn.Module):
    """Gated MLP, hidden width 8/3 of the input's rounded up to a multiple of 8. (..., fan_in) -> (..., fan_out)."""

    def __init__(self, fan_in: int, fan_out: int | None = None, hidden: int | None = None):
        super().__init__()
        hidden = hidden or math.ceil(fan_in * 8 / 3 / 8) * 8
        self.gate_up = linear(fan_in, 2 * hidden)
        self.down = linear(hidden, fan_out or fan_in)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


class ShortConv(nn.Module):
    """Each token with the `width` - 1 tokens before it: a causal convolution over all channels. (B, S, d) -> (B, S, d).

    It binds what stands in several tokens, such as the pair `A>B`, before the recurrence begins. Mamba (arXiv
    2312.00752) has one channel by channel; here every place has a matrix, so that the letters of a pair keep apart.
    """

    def __init__(self, d: int, width: int):
        super().__init__()
        self.width = width
        self.mix = linear(width * d, d)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Tokens that mask (B, S) leaves out count as zeros."""
        x = x * mask[..., None].to(x.dtype)
        places = [F.pad(x, (0, 0, place, 0))[:, : x.shape[1]] for place in range(self.width)]
        return self.mix(torch.cat(places, dim=-1))


class EncoderLayer(nn.Module):
    """Post-norm layer `norm(h + f(h))`, attention then SwiGLU, no biases, no norm weights."""

    def __init__(self, d: int, heads: int):
        super().__init__()
        self.attention = Attention(d, heads)
        self.mlp = SwiGLU(d)

    def forward(self, x: Tensor, context: Context) -> Tensor:
        x = rms_norm(x + self.attention(x, context))
        return rms_norm(x + self.mlp(x))


class EncoderBlock(nn.Module):
    """A stack of encoder-only layers over the prompt's tokens. (B, S, d) -> (B, S, d)."""

    def __init__(self, d: int, heads: int, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(d, heads) for _ in range(layers))

    def forward(self, x: Tensor, context: Context) -> Tensor:
        for layer in self.layers:
            x = layer(x, context)
        return x


class HBlock(EncoderBlock):
    """The slow module: one call a segment, `z_H = H(z_H + z_L)`."""


class LBlock(EncoderBlock):
    """The fast module: inner_T calls a segment, `z_L = L(z_L + z_H + x)`."""


# --- recurrence -------------------------------------------------------------------------------------------------------


def first_call_with_gradient(horizon: str, calls: int) -> int:
    """Index of the first of a segment's `calls` L calls that carries gradient.

    `one_step` (HRM): the last L call and the H call after it; `full` (TRM) and `segments:N`: all; `k:N` (HRM-Text): the
    last N L calls. H calls carry gradient from that L call on.

    Raises:
        ValueError: another spelling.
    """
    if horizon == "full":
        return 0
    if horizon == "one_step":
        return calls - 1

    match = re.fullmatch(r"(k|segments):([1-9]\d*)", horizon)
    if not match:
        raise ValueError(f"gradient horizon {horizon!r} is unknown: choose one_step, full, k:N, segments:N with N >= 1")
    return max(calls - int(match[2]), 0) if match[1] == "k" else 0


def segments_with_gradient(horizon: str) -> int:
    """Segments that the gradient of a supervised one runs through, itself counted: N of `segments:N`, else 1."""
    return int(horizon.partition("segments:")[2] or 1)


def recur(
    step_low: Callable[[Tensor, Tensor], Tensor],
    step_high: Callable[[Tensor, Tensor], Tensor],
    z_high: Tensor,
    z_low: Tensor,
    inner_T: int,
    cycles: int = 1,
    horizon: str = "one_step",
) -> tuple[Tensor, Tensor]:
    """`cycles` times: `z_L = step_low(z_L, z_H)` inner_T times, then `z_H = step_high(z_H, z_L)` (HRM, eq. 1 to 4).

    The steps know the input x: HRM's are `L(z_L + z_H + x)` and `H(z_H + z_L)`. Calls before the horizon run without
    gradient. Returns (z_high, z_low), shapes as given.

    Raises:
        ValueError: as `first_call_with_gradient`.
    """
    first = first_call_with_gradient(horizon, cycles * inner_T)
    enabled = torch.is_grad_enabled()  # inside `no_grad` no call carries gradient, whatever the horizon

    for call in range(cycles * inner_T):
        with torch.set_grad_enabled(enabled and call >= first):
            z_low = step_low(z_low, z_high)
            if (call + 1) % inner_T == 0:
                z_high = step_high(z_high, z_low)
    return z_high, z_low


class HRMCore(nn.Module):
    """H and L blocks with their initial states and the halting head.

    `init_state` says how z_H and z_L begin:

        fixed   two vectors drawn once (truncated normal, deviation 1), kept as buffers: saved, not trained
        random  in training every example starts from fresh normal vectors of deviation 1, which teaches the recurrence
                to settle from anywhere; at evaluation as `fixed`
        zero    zeros, so that the first L call sees x alone, not x under two vectors of its own size

    `state_mix` says how earlier states enter a block:

        sum     the published recurrence, `L(x + z_L + z_H)` and `H(z_L + z_H)`
        gated   learned gates (d,), one per channel, that begin at zero: `L(x + g1 * z_L + g2 * z_H)`, `H(z_L + g3 *
                z_H)`. Every segment of an untrained core is then the same single pass, and training opens the gates
                where a further step pays. One segment from zero states reads no z_H but zero, so g2 and g3 get no
                gradient before there is a second segment.

    With `share` one block makes both steps, as in the Tiny Recursive Model (arXiv 2510.04871): it can tell them apart
    because only L's input holds x. With `h_layers` 0 there is no H: `z_H = z_L = L(z_L + x)`, one looped block. `d` is
    the width, `heads` divides it into an even number of channels, `inner_T` counts the L steps before each H step,
    `horizon` is `first_call_with_gradient`'s, `reset_l` starts z_L anew at each segment.

    Raises:
        ValueError: a width that the heads do not divide, a shared block of two depths, an unknown horizon.
    """

    z_high_init: Tensor  # (d,) buffers
    z_low_init: Tensor

    def __init__(
        self,
        d: int,
        heads: int,
        h_layers: int,
        l_layers: int,
        inner_T: int,
        horizon: str = "full",
        reset_l: bool = False,
        init_state: str = "fixed",
        share: bool = False,
        state_mix: str = "sum",
    ):
        super().__init__()
        if share and h_layers != l_layers:
            raise ValueError(f"a shared block has one depth: h_layers {h_layers} and l_layers {l_layers} must be equal")
        if d % heads or d // heads % 2:
            raise ValueError(f"HRM width {d} must be an even multiple of its {heads} heads: RoPE turns pairs of a head")
        first_call_with_gradient(horizon, inner_T)
        self.d = d
        self.heads = heads
        self.inner_T = inner_T
        self.horizon = horizon
        self.reset_l = reset_l
        self.init_state = init_state
        self.state_mix = state_mix

        # One name per tensor: a second name for the shared block would be saved and averaged twice.
        self.h_block = HBlock(d, heads, h_layers) if h_layers else None
        self.l_block = None if share else LBlock(d, heads, l_layers)
        if state_mix == "gated":
            self.low_gate = nn.Parameter(torch.zeros(d))
        if state_mix == "gated" and h_layers:
            self.high_gate = nn.Parameter(torch.zeros(d))
            self.carry_gate = nn.Parameter(torch.zeros(d))

        self.halt = nn.Linear(d, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, HALT_BIAS)

        # Drawn for "zero" as well, so that the random numbers after this do not depend on `init_state`.
        for name in ("z_high_init", "z_low_init"):
            fixed = nn.init.trunc_normal_(torch.empty(d), std=1.0, a=-2.0, b=2.0)
            self.register_buffer(name, torch.zeros(d) if init_state == "zero" else fixed)

    def context(self, mask: Tensor, positions: Tensor) -> Context:
        """Shares mask (B, S) and positions (B, S) among all block calls of a batch."""
        cos, sin = rope(positions, self.d // self.heads)
        return Context(mask, cos, sin)

    def _initial(self, fixed: Tensor, batch: int, length: int) -> Tensor:
        """(B, S, d): the fixed vector, or in training with `random` one drawn vector per example."""
        if self.training and self.init_state == "random":
            start = torch.randn(batch, 1, self.d, device=fixed.device, dtype=fixed.dtype)
            return start.expand(batch, length, self.d)
        return fixed.expand(batch, length, self.d)

    def initial_carry(self, mask: Tensor) -> Carry:
        """The state before the first segment for a batch with mask (B, S)."""
        batch, length = mask.shape
        return Carry(
            z_high=self._initial(self.z_high_init, batch, length),
            z_low=self._initial(self.z_low_init, batch, length),
            steps=torch.zeros(batch, dtype=torch.int64, device=mask.device),
            halted=torch.zeros(batch, dtype=torch.bool, device=mask.device),
        )

    def _low_input(self, z_low: Tensor, z_high: Tensor, x: Tensor) -> Tensor:
        """What L reads; the order of the sum is part of the numbers a run repeats."""
        if self.h_block is None:  # z_H is z_L
            return x + z_low if self.state_mix == "sum" else x + self.low_gate * z_low
        if self.state_mix == "sum":
            return z_low + z_high + x
        return x + self.low_gate * z_low + self.high_gate * z_high

    def _high_input(self, z_high: Tensor, z_low: Tensor) -> Tensor:
        """What H reads."""
        if self.state_mix == "sum":
            return z_high + z_low
        return z_low + self.carry_gate * z_high

    def forward(self, x: Tensor, context: Context, carry: Carry) -> Carry:
        """One segment over x (B, S, d); a row that has had as many as `context.needed` says stays as it is."""
        z_low = self._initial(self.z_low_init, *x.shape[:2]) if self.reset_l else carry.z_low
        l_block = self.h_block if self.l_block is None else self.l_block
        assert l_block is not None  # a shared block is H's

        def step_low(low: Tensor, high: Tensor) -> Tensor:
            return l_block(self._low_input(low, high, x), context)

        def step_high(high: Tensor, low: Tensor) -> Tensor:
            return low if self.h_block is None else self.h_block(self._high_input(high, low), context)

        z_high, z_low = recur(step_low, step_high, carry.z_high, z_low, self.inner_T, horizon=self.horizon)
        after = Carry(z_high, z_low, carry.steps + 1, carry.halted)
        return after if context.needed is None else after.where(carry.steps < context.needed, carry)

    def halt_logits(self, z_high: Tensor, mask: Tensor) -> Tensor:
        """(B,) logits of "this answer is right": the head reads the last readable column, for column 0 may be a pad."""
        return self.halt(last_state(z_high, mask)).squeeze(-1)


class SinglePassCore(HRMCore):
    """HRM's blocks without HRM's recurrence: what `--adapter mlp` trains in place of `HRMCore`.

        HRM          z_L = L(z_L + z_H + x) inner_T times, z_H = H(z_H + z_L), for every segment, from initial states
        single pass  z_L = L(x), z_H = H(z_L), once

    Reading, injection and both blocks are HRM's. There is no initial state, no sum with an earlier state, no gate: it
    is an encoder of l_layers + h_layers layers. It takes `HRMCore`'s arguments; those of the recurrence do nothing.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs | {"state_mix": "sum"})  # no gates: there is no earlier state
        del self.z_high_init
        del self.z_low_init

    def initial_carry(self, mask: Tensor) -> Carry:
        """An empty state, which nothing reads, for a batch with mask (B, S)."""
        nothing = torch.zeros(1, 1, self.d, device=mask.device).expand(*mask.shape, self.d)
        steps = torch.zeros(len(mask), dtype=torch.int64, device=mask.device)
        return Carry(nothing, nothing, steps, steps.bool())

    def forward(self, x: Tensor, context: Context, carry: Carry) -> Carry:
        """The pass over x (B, S, d); whatever state comes in, the same one goes out."""
        assert self.l_block is not None  # nothing is shared without a recurrence
        z_low = self.l_block(x, context)
        z_high = z_low if self.h_block is None else self.h_block(z_low, context)
        return Carry(z_high, z_low, carry.steps + 1, carry.halted)
