"""The hybrid's encoder: states of the tokens, and HRM over them.

Shapes: B batch, S encoder tokens, D width, d HRM width, H slots of the slow bank, m memory tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from engine.attention import key_mask
from engine.positions import mean_state, token_positions
from hybrid.banks import BankCore, Bridge, CycleState, Gate
from hybrid.config import HybridConfig
from hybrid.layers import Mamba2Encoder, Memory, TransformerEncoder


@dataclass
class HybridEncoderOutput(ModelOutput):
    """What the decoder reads."""

    last_hidden_state: Tensor | None = None  # (B, S, D)
    memory: Tensor | None = None  # (B, m, D); None while the gate is shut
    gate: Tensor | None = None  # (B,) scaled gate
    cycles_used: Tensor | None = None  # (B,) int64
    halt_sum: Tensor | None = None  # (B,) halting probabilities summed over the cycles used
    z_norm: Tensor | None = None  # (B,) norm of the mean of z_H's slots


class HybridEncoder(nn.Module):
    """Token states, and HRM over them: what `generate` calls once per prompt."""

    main_input_name = "input_ids"

    def __init__(self, config: HybridConfig):
        super().__init__()
        self.config = config
        width = config.d_model
        heads = config.n_heads

        # The tokens. The decoder embeds its own with this table too.
        self.embed = nn.Embedding(config.vocab_size, width)
        nn.init.normal_(self.embed.weight, std=width**-0.5)
        if config.encoder == "mamba2":
            self.backbone = Mamba2Encoder(width, config.encoder_layers, config.state_size)
        else:
            self.backbone = TransformerEncoder(width, heads, config.encoder_layers)

        # HRM, and its way to the decoder.
        self.core = BankCore(
            d=config.d_h,
            heads=heads,
            width=width,
            h_len=config.h_len,
            l_len=config.l_len,
            h_layers=config.h_layers,
            l_layers=config.l_layers,
            h_cycles=config.h_cycles,
            l_steps=config.l_steps,
            horizon=config.grad_horizon,
        )
        self.bridge = Bridge(config.bridge, config.d_h, heads, width, config.prefix_len)
        self.gate = Gate(config.d_h, width)

    def encode(self, input_ids: Tensor, mask: Tensor) -> Tensor:
        """(B, S, D) states of the tokens (B, S); padding may stand on either side."""
        return self.backbone(self.embedded(input_ids), mask, token_positions(mask))

    def embedded(self, ids: Tensor) -> Tensor:
        """(B, N, D) of unit variance, of ids (B, N)."""
        return self.embed(ids) * self.config.d_model**0.5

    def cycles(self, states: Tensor, mask: Tensor) -> list[CycleState]:
        """All cycles of HRM over states (B, S, D) with mask (B, S), in order."""
        source = self.core.read(states)
        keys = key_mask(mask)
        z_high, z_low = self.core.start(len(states))

        done = []
        for _ in range(self.core.h_cycles):
            z_high, z_low = self.core.cycle(z_high, z_low, source, keys)
            done.append(CycleState(z_high, self.core.halt_logits(z_high)))
        return done

    def think(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """HRM at evaluation: an example leaves the batch once its halting probabilities sum to the threshold.

        From then on it costs nothing. `states` (B, S, D), `mask` (B, S).

        Returns:
            z_H (B, H, d), cycles used (B,) int64, summed halting probabilities (B,).
        """
        config = self.config
        keys = key_mask(mask)
        key, value = self.core.read(states)
        z_high, z_low = self.core.start(len(states))

        # What is returned, for all examples; below stand those still in the batch, whose numbers are `here`.
        final = z_high.new_zeros(z_high.shape, dtype=states.dtype)
        used = torch.zeros(len(states), dtype=torch.int64, device=states.device)
        sums = torch.zeros(len(states), device=states.device)
        total = sums.clone()
        here = torch.arange(len(states), device=states.device)

        for count in range(1, config.h_cycles + 1):
            z_high, z_low = self.core.cycle(z_high, z_low, (key, value), keys)
            final[here] = z_high.to(final.dtype)
            used[here] = count
            total = total + self.core.halt_logits(z_high).float().sigmoid()
            sums[here] = total
            if not config.use_halting or count == config.h_cycles:
                continue

            # Who goes on.
            unsure = total < config.halt_threshold
            if not bool(unsure.any()):
                break
            if not bool(unsure.all()):
                here = here[unsure]
                total = total[unsure]
                z_high = z_high[unsure]
                z_low = z_low[unsure]
                key = key[unsure]
                value = value[unsure]
                keys = None if keys is None else keys[unsure]
        return final, used, sums

    def memory(self, z_high: Tensor, pooled: Tensor, scale: float) -> Memory:
        """What the decoder may read of z_H (B, H, d): memory tokens, and the gate times `scale`.

        `pooled` (B, D) is the mean of the encoder's states.
        """
        return Memory(self.bridge(z_high), self.gate(z_high, pooled) * scale)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **unused: Any) -> HybridEncoderOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        states = self.encode(input_ids, mask)

        # With the gate shut nobody reads HRM: it does not run.
        if self.config.gate_scale == 0:
            none_used = torch.zeros(len(states), dtype=torch.int64, device=states.device)
            return HybridEncoderOutput(states, cycles_used=none_used)

        # With gradients all cycles run, because examples that leave the batch have no part in its graph.
        used = None
        sums = None
        if torch.is_grad_enabled() and self.training:
            last = self.cycles(states, mask)[-1].z_high
        else:
            last, used, sums = self.think(states, mask)

        memory = self.memory(last, mean_state(states, mask), self.config.gate_scale)
        return HybridEncoderOutput(states, memory.tokens, memory.gate, used, sums, slot_mean_norm(last))


def slot_mean_norm(z_high: Tensor) -> Tensor:
    """(B,) norm of the mean of z_H's slots (B, H, d). Each slot has the norm sqrt(d): as much means that all agree."""
    return z_high.float().mean(dim=1).norm(dim=-1)
