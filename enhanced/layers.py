"""Layers of the planner/worker model: causal attention over key/value slots, token choice, thought and gate heads.

Shapes: B batch, T tokens of this call, S keys (past and present), d width, h heads, e = d / h. After the gate has
stopped some tokens, R rows still hold running ones, at most A of them in a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from transformers import Cache, DynamicCache, StaticCache
from transformers.cache_utils import DynamicLayer

from engine.attention import attend, rotate
from hrm_blocks import SwiGLU, linear, rms_norm

NEUTRAL_GATE = 2.0  # an untrained gate says "uncertain" (entropy 0.88 of the most, confidence 0.12): it stops nothing


@dataclass
class Chosen:
    """The tokens that run another cycle, packed: rows without any are left out, the others shortened."""

    rows: Tensor  # (R, 1) int64
    columns: Tensor  # (R, A) int64
    real: Tensor  # (R, A) bool; the rest fills shorter rows up and is thrown away

    @classmethod
    def of(cls, active: Tensor) -> Chosen:
        """Packs `active` (B, T) bool; at least one token must run."""
        rows = active.any(dim=1).nonzero()
        running = active[rows[:, 0]]

        # Stable: running tokens come first and stay in the order of the text, which causal attention needs.
        order = torch.argsort(~running, dim=1, stable=True)
        columns = order[:, : int(running.sum(dim=1).max())]
        return cls(rows, columns, running.gather(1, columns))

    def take(self, whole: Tensor) -> Tensor:
        """(B, T, ...) -> (R, A, ...)."""
        return whole[self.rows, self.columns]

    def put(self, whole: Tensor, part: Tensor) -> Tensor:
        """A copy of whole (B, T, ...) with part (R, A, ...) written where it is real."""
        rows = self.rows.expand_as(self.columns)[self.real]
        return whole.index_put((rows, self.columns[self.real]), part[self.real].to(whole.dtype))


def take(chosen: Chosen | None, whole: Tensor) -> Tensor:
    """What the chosen tokens hold: (R, A, ...) of (B, T, ...); all of it where None are chosen."""
    return whole if chosen is None else chosen.take(whole)


def put(chosen: Chosen | None, whole: Tensor, part: Tensor) -> Tensor:
    """`whole` (B, T, ...) with the chosen tokens' new values `part`; `part` itself where None are chosen."""
    return part if chosen is None else chosen.put(whole, part)


@dataclass
class KeyValueSlots:
    """Keys and values of one call, one slot per (cycle, layer); slot = cycle * layers + layer.

    A token that stopped is read in later cycles as it was when it stopped. Therefore `carried` holds this call's keys
    and values of each layer's last executed cycle.

    Args:
        layers: layers of planner and worker together.
        cache: keys and values of earlier calls; None = there are none, and none are kept.
        carry: whether tokens may stop, so that `carried` is needed.
    """

    layers: int
    cache: Cache | None = None
    carry: bool = False
    carried: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)  # by layer

    def exchange(self, key: Tensor, value: Tensor, cycle: int, layer: int, chosen: Chosen | None) -> list[Tensor]:
        """Stores new key and value (R, h, A, e); returns all that these rows may read, each (R, h, S, e)."""
        new = [key, value]
        if chosen is not None:
            packed = zip(self.carried[layer], new, strict=True)
            new = [chosen.put(old.transpose(1, 2), part.transpose(1, 2)).transpose(1, 2) for old, part in packed]

        # From here on, keys and values are those of all B rows and T tokens.
        if self.carry:
            self.carried[layer] = (new[0], new[1])
        if self.cache is not None:
            new = list(self.cache.update(*new, cycle * self.layers + layer))

        if chosen is None:
            return new
        return [part[chosen.rows[:, 0]] for part in new]

    def repeat(self, cycle: int) -> None:
        """Fills the slots of a cycle that no token runs."""
        if self.cache is not None:
            for layer, (key, value) in self.carried.items():
                self.cache.update(key, value, cycle * self.layers + layer)


def usable_cache(cache: Cache | None, slots: int) -> Cache | None:
    """A cache with at least `slots` slots: more cycles than the config names need more than it was built with.

    Raises:
        ValueError: a static cache, whose length says nothing of the tokens it holds.
    """
    if isinstance(cache, StaticCache):
        raise ValueError("static caches are not supported: leave cache_implementation out")
    if isinstance(cache, DynamicCache) and cache.layer_class_to_replicate is None:
        cache.layers.extend(DynamicLayer() for _ in range(slots - len(cache.layers)))
    return cache


@dataclass
class CycleContext:
    """What every layer call of one cycle shares."""

    index: int  # of the cycle, from 0
    cos: Tensor  # (R, A, e)
    sin: Tensor  # (R, A, e)
    mask: Tensor | None  # (R, 1, A, S) bool; None: everything may be read
    slots: KeyValueSlots
    chosen: Chosen | None = None  # None: all tokens run

    def of(self, index: int, chosen: Chosen | None) -> CycleContext:
        """The cycle `index`, run by the chosen tokens alone; called on a cycle of all tokens."""
        mask = self.mask
        if chosen is not None and mask is not None:
            mask = chosen.take(mask[:, 0])[:, None]
        return CycleContext(index, take(chosen, self.cos), take(chosen, self.sin), mask, self.slots, chosen)


def causal_mask(attention_mask: Tensor, tokens: int) -> Tensor | None:
    """(B, 1, T, S) bool for the last T of S columns: readable, and not later than the reader; None if all True.

    Every column reads itself, so that a pad's softmax stays finite; nobody reads a pad.
    """
    length = attention_mask.shape[1]
    reader = torch.arange(length - tokens, length, device=attention_mask.device)[:, None]
    column = torch.arange(length, device=attention_mask.device)[None]

    mask = ((column < reader) & attention_mask.bool()[:, None]) | (column == reader)
    return None if bool(mask.all()) else mask[:, None]


class CausalLayer(nn.Module):
    """Attention over this (cycle, layer)'s slot, then SwiGLU; post-norm `norm(x + f(x))`. (R, A, d) -> (R, A, d)."""

    def __init__(self, d: int, heads: int, hidden: int, index: int):
        super().__init__()
        self.heads = heads
        self.index = index  # among the layers of planner and worker
        self.qkv = linear(d, 3 * d)
        self.out = linear(d, d)
        self.mlp = SwiGLU(d, hidden=hidden)

    def attention(self, x: Tensor, cycle: CycleContext) -> Tensor:
        """(R, A, d) -> (R, A, d): each running token reads all tokens up to itself, stopped ones included."""
        q, k, v = rearrange(self.qkv(x), "R A (three h e) -> three R h A e", three=3, h=self.heads)
        q = rotate(q, cycle.cos, cycle.sin)
        k = rotate(k, cycle.cos, cycle.sin)

        keys, values = cycle.slots.exchange(k, v, cycle.index, self.index, cycle.chosen)
        return self.out(rearrange(attend(q, keys, values, cycle.mask), "R h A e -> R A (h e)"))

    def forward(self, x: Tensor, cycle: CycleContext) -> Tensor:
        x = rms_norm(x + self.attention(x, cycle))
        return rms_norm(x + self.mlp(x))


class ThoughtHead(nn.Module):
    """A latent thought of each position, and the guess of the next position's. (B, T, d) -> (B, T, thought).

    Trained as in joint-embedding prediction: the target is an exponential moving average of the projection (BYOL, arXiv
    2006.07733), a buffer that is saved and never trained, and a variance and a covariance term keep thoughts from
    collapsing (VICReg, arXiv 2105.04906).
    """

    def __init__(self, d: int, thought_dim: int):
        super().__init__()
        self.project = linear(d, thought_dim)
        self.predict = nn.Sequential(linear(thought_dim, thought_dim), nn.SiLU(), linear(thought_dim, thought_dim))
        self.register_buffer("target", self.project.weight.detach().clone())

    def forward(self, state: Tensor) -> Tensor:
        return self.project(state)

    @torch.no_grad()
    def update_ema(self, decay: float) -> None:
        """Moves the target by `1 - decay` of the way to the projection."""
        self.target.lerp_(self.project.weight.to(self.target.dtype), 1 - decay)

    def losses(self, state: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Terms over neighbours in `state` (B, T, d) that `mask` (B, T) attends both; each a scalar.

        `next`, `variance` and `covariance` are losses: the mean squared error of the guessed next thought, and VICReg's
        two terms. `spread` is the mean deviation of a thought's components and `mean_error` what always guessing the
        mean target would cost, both without gradient.
        """
        pairs = mask[:, :-1].bool() & mask[:, 1:].bool()
        thought = self.project(state[:, :-1][pairs]).float()
        if len(thought) < 2:  # no variance; the zero keeps the graph, so that every rank has the same gradients
            zero = thought.sum() * 0.0
            return dict.fromkeys(("next", "variance", "covariance", "spread", "mean_error"), zero)

        with torch.no_grad():
            target = F.linear(state[:, 1:][pairs].float(), self.target.float())

        # Components should spread (deviation 1) and say different things (no covariance between two of them).
        centred = thought - thought.mean(dim=0)
        deviation = (centred.pow(2).sum(dim=0) / (len(thought) - 1) + 1e-4).sqrt()
        covariance = centred.T @ centred / (len(thought) - 1)
        off_diagonal = covariance.pow(2).sum() - covariance.diagonal().pow(2).sum()

        return {
            "next": F.mse_loss(self.predict(thought).float(), target),
            "variance": F.relu(1 - deviation).mean(),
            "covariance": off_diagonal / thought.shape[1],
            "spread": deviation.mean().detach(),
            "mean_error": target.var(dim=0, correction=0).mean(),
        }


class GateHead(nn.Module):
    """Guesses, from the worker's state alone, how sure the token head is. (..., d) -> two of (...), each in 0..1.

    The first is the entropy of the next token as a share of log V, the second the largest probability. The token head
    itself would cost V times the width for every token and cycle.
    """

    def __init__(self, d: int, hidden: int = 64):
        super().__init__()
        self.inner = linear(d, hidden)
        self.outer = nn.Linear(hidden, 2)

        # Nearly blind at first, and on the safe side: see NEUTRAL_GATE.
        nn.init.normal_(self.outer.weight, std=0.01)
        with torch.no_grad():
            self.outer.bias.copy_(torch.tensor([NEUTRAL_GATE, -NEUTRAL_GATE]))

    def forward(self, state: Tensor) -> tuple[Tensor, Tensor]:
        entropy, confidence = self.outer(F.silu(self.inner(state))).float().sigmoid().unbind(-1)
        return entropy, confidence

    def loss(self, state: Tensor, logits: Tensor) -> Tensor:
        """Mean squared error of both against the truth in `logits` (N, V); moves the head, not the state (N, d)."""
        if not len(state):  # a zero with a graph: ranks of a DDP run must agree on what has a gradient
            return logits.sum() * 0.0
        guessed = torch.stack(self(state.detach()))
        return F.mse_loss(guessed, torch.stack(certainty(logits)))


@torch.no_grad()
def certainty(logits: Tensor) -> tuple[Tensor, Tensor]:
    """(entropy as a share of log V, largest probability), each (...), of logits (..., V)."""
    log_p = F.log_softmax(logits.float(), dim=-1)
    return -(log_p.exp() * log_p).sum(-1) / math.log(logits.shape[-1]), log_p.amax(-1).exp()
