"""Segments of inference: which of them an example answers from, and what it is watched by until it stops."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from engine.positions import last_state, relative_change
from hrm_blocks import Context, HRMCore
from injector import Slots, Thought


@dataclass(frozen=True)
class StopRule:
    """When an example has thought enough.

    Args:
        most: segments after which every example stops, 1 or more.
        by_head: an example stops when its halting head says "right" (logit > 0).
        best_of_all: with `by_head` no example stops; each answers from the segment of the highest halting score.
        settled: share of a norm, 0 to 1: an example stops when a segment changes what is watched by less; 0 = off.
        settled_at: what is watched, see `watched_in`.
    """

    most: int
    by_head: bool = False
    best_of_all: bool = False
    settled: float = 0.0
    settled_at: str = "answer"


def first_slot(embed: Callable[[Tensor], Tensor], input_ids: Tensor, last: Tensor, prompt_mask: Tensor,
               positions: Tensor) -> Slots:
    """The last token of each prompt, T 1, whose state in `last` (B, N, D) predicts the answer's first token."""
    hidden, ids, places = (last_state(part, prompt_mask)[:, None] for part in (last, input_ids, positions))
    return Slots(hidden, embed(ids), places)


def watched_in(place: str, injector: nn.Module, slots: Slots, thought: Thought) -> Tensor:
    """What settles before an example stops, by `halt_settled_at`.

    answer: (B, 1, D) that the injector writes at `slots`, T 1, from which the answer's first token is predicted.
    prompt: z_high (B, S, d) with zeros at padding, which waits for all that the prompt sets going.
    """
    if place == "answer":
        return injector(slots, thought)
    return thought.z_high * thought.context.mask[..., None].to(thought.z_high.dtype)


def best_halted(core: HRMCore, x: Tensor, context: Context, segments: int) -> tuple[Tensor, Tensor]:
    """As `think_until`, all segments; each example answers from the (first) one of the highest halting score."""
    carry = core(x, context, core.initial_carry(context.mask))
    z_high = carry.z_high
    score = core.halt_logits(carry.z_high, context.mask)
    for _ in range(segments - 1):
        carry = core(x, context, carry.detach())
        logits = core.halt_logits(carry.z_high, context.mask)
        z_high = torch.where((logits > score)[:, None, None], carry.z_high, z_high)
        score = torch.maximum(score, logits)
    return z_high.to(x.dtype), carry.steps


def think_until(
    rule: StopRule, core: HRMCore, injector: nn.Module, x: Tensor, context: Context, slots: Slots
) -> tuple[Tensor, Tensor]:
    """All segments of inference: (z_high (B, S, d), segments used (B,)).

    An example leaves the batch when `rule` stops it: more segments would change nothing, or its head says "right".

    Args:
        rule: when an example stops.
        core: the recurrence.
        injector: writes at the answer's first slot, where `settled_at` watches that.
        x: (B, S, d), what the core reads.
        context: the prompt's mask and positions.
        slots: the last prompt token, T 1.
    """
    if rule.by_head and rule.best_of_all:
        return best_halted(core, x, context, rule.most)

    carry = core.initial_carry(context.mask)
    z_high = torch.empty_like(x)
    used = torch.zeros_like(carry.steps)
    active = torch.arange(len(x), device=x.device)  # row in the batch of each example that still thinks
    watched = None
    for segment in range(rule.most):
        carry = core(x, context, carry.detach())  # as in training, gradient stays within a segment

        # Who answers from this segment?
        done = torch.full_like(carry.halted, segment == rule.most - 1)
        if rule.by_head:
            done |= core.halt_logits(carry.z_high, context.mask) > 0
        if rule.settled:
            earlier = watched
            watched = watched_in(rule.settled_at, injector, slots, Thought(carry.z_high, context))
            if earlier is not None:
                done |= relative_change(earlier, watched) < rule.settled
        if not bool(done.any()):
            continue

        # Their states are kept, and the batch shrinks to the others.
        z_high[active[done]] = carry.z_high[done].to(x.dtype)
        used[active[done]] = carry.steps[done]
        active = active[~done]
        if not len(active):
            break
        carry = carry.rows(~done)
        x = x[~done]
        context = context.rows(~done)
        slots = slots.rows(~done)
        watched = None if watched is None else watched[~done]
    return z_high, used
