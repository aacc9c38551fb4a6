"""The training loss of the planner/worker LM: token cross-entropy and five auxiliary terms.

The auxiliary terms teach the cycles to settle, the thought head to look ahead, the gate to know when the token head is
sure, and the token head to answer at an earlier cycle, where the gate may stop a token.
Shapes: B batch, T tokens, d width, V vocabulary.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from engine.batches import IGNORE
from enhanced.config import EnhancedBackboneOutput, EnhancedHRMConfig


def training_loss(
    model: Any, out: EnhancedBackboneOutput, logits: Tensor, labels: Tensor, mask: Tensor,
    items: Tensor | float | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(weighted sum with gradient, its unweighted parts without): tokens, cycles, thoughts, gate, early exits.

    Args:
        model: the `EnhancedHRMForCausalLM`; in training mode the gate's losses draw tokens at random.
        out: the backbone's output with the worker's state of every cycle.
        logits: (B, T, V) of the last cycle's states.
        labels: (B, T); position t is scored on the label at t + 1, IGNORE is not scored.
        mask: (B, T), 0 at padding.
        items: scored tokens of the global batch where it spans several calls; None = this call is all of it.
    """
    # Cross-entropy over the scored tokens of this call, as a share of the whole batch's where `items` counts those.
    scored = (labels[:, 1:] != IGNORE) & mask[:, :-1].bool()  # a left pad does not guess the first token
    target = labels[:, 1:][scored]
    summed = F.cross_entropy(logits[:, :-1][scored].float(), target, reduction="sum")
    if items is None:
        token = summed / max(len(target), 1)
        share = 1.0
    else:
        token = summed / items
        share = len(target) / items  # of the auxiliary means, across accumulated calls

    # Auxiliary losses: means over this call.
    thought = model.thought_head.losses(out.last_hidden_state, mask)
    gate, early = _gate_losses(model, out, logits, labels, mask.bool(), scored)
    cycle = _cycle_loss(out.worker_states, mask)
    auxiliary = _auxiliary(model.config, thought, cycle, gate, early)

    # For the log: no gradient, no weights.
    used = out.cycles_used[mask.bool()].float()
    metrics = {
        "loss_token": token,
        "loss_cycle": cycle,
        **{f"loss_thought_{name}": thought[name] for name in ("next", "variance", "covariance")},
        "loss_gate": gate,
        "loss_exit": early,
        "thought_spread": thought["spread"],
        "thought_mean_error": thought["mean_error"],
        "cycles_used": used.mean() if len(used) else used.sum(),
    }
    return token + share * auxiliary, {name: value.detach() for name, value in metrics.items()}


def _auxiliary(
    config: EnhancedHRMConfig, thought: dict[str, Tensor], cycle: Tensor, gate: Tensor, early: Tensor
) -> Tensor:
    """The weighted sum of the auxiliary losses. Floating point adds in this order."""
    thought_loss = thought["next"] + config.variance_weight * thought["variance"]
    thought_loss = thought_loss + config.covariance_weight * thought["covariance"]
    auxiliary = config.cycle_weight * cycle + config.thought_weight * thought_loss
    return auxiliary + config.gate_weight * gate + config.exit_weight * early


def _cycle_loss(states: tuple[Tensor, ...], mask: Tensor) -> Tensor:
    """Mean squared change of the worker's state from cycle to cycle.

    Each state is pulled towards the next and never the next towards it, which idle cycles would satisfy.
    """
    readable = mask.bool()
    if len(states) < 2 or not bool(readable.any()):
        return states[0].sum() * 0.0  # a zero with a graph: ranks of a DDP run agree on what has a gradient

    changes = []
    for state, following in pairwise(states):
        changes.append(F.mse_loss(state[readable], following[readable].detach()))
    return torch.stack(changes).mean()


def _gate_losses(
    model: Any, out: EnhancedBackboneOutput, logits: Tensor, labels: Tensor, readable: Tensor, scored: Tensor
) -> tuple[Tensor, Tensor]:
    """(gate's error on readable tokens, cross-entropy of early exits on scored ones).

    While training, at most `exit_sample` tokens are drawn, and the gate learns from the logits at hand and from
    those of one earlier cycle, drawn at random, which are trained too: a token that stops there is answered there.
    """
    gate = model.model.gate
    states = out.worker_states
    places = readable.nonzero()

    # A sample of the tokens: the token head's logits of all of them, once more, would cost too much.
    if model.training:
        places = places[torch.randperm(len(places), device=places.device)[: model.config.exit_sample]]
    rows, columns = places.unbind(dim=1)

    error = gate.loss(out.last_hidden_state[rows, columns], logits[rows, columns])
    if not model.training or len(states) < 2:
        return error, logits.sum() * 0.0

    # The token head at an earlier cycle, on the drawn tokens that have a label.
    state = states[int(torch.randint(len(states) - 1, ()))][rows, columns]
    early = model.lm_head(state).float()
    is_scored = F.pad(scored, (0, 1))[rows, columns]
    target = labels.roll(-1, dims=1)[rows, columns][is_scored]
    exits = F.cross_entropy(early[is_scored], target, reduction="sum") / max(len(target), 1)
    return (error + gate.loss(state, early)) / 2, exits
