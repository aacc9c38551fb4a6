"""How z_H enters the LLM: `InjectorGRB` (gated residual bias) and `InjectorCAB` (cross-attention bridge).

`PromptGate` decides for each prompt whether it does so at all.

Both map (hidden, embedded token, z_H) at the answer's positions to a bias on the LLM's final hidden states. Exactly one
factor, the output projection `out`, starts at zero, so at step 0 the model is the bare LLM. A row whose prompt is empty
keeps the bare LLM's states (`model.HRMBackbone.inject`).
Shapes: B batch, S prompt tokens, T answer positions, D LLM width, d HRM width, m memory tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from engine.attention import attend, rope, rotate
from engine.positions import last_state, mean_state
from hrm_blocks import Context, SwiGLU, linear, rms_norm, zero_linear

Made = TypeVar("Made")
HIDDEN_TOO = "hidden+embed"
GATE_WIDTH = 32  # channels in which the gate compares prompts
GATE_RADIUS = 0.5  # distance below which it is open; training draws the tasks' prompts below 0.1, others beyond 1
SEES = (HIDDEN_TOO, "embed")  # what an injector sees of a position: the LLM's state there too, or its token alone


@dataclass
class Thought:
    """What the injector reads: the slow state and where its positions lie."""

    z_high: Tensor  # (B, S, d)
    context: Context
    start: Tensor | None = None  # (B,) column of the last prompt token, the first that may be injected; None: all slots
    opened: Tensor | None = None  # (B,) bool, False where the gate is shut for a prompt; None: there is no gate
    length: int = 0  # columns up to the last of these, where there is a start
    _kept: dict[str, object] = field(default_factory=dict, repr=False)

    def once(self, name: str, make: Callable[[], Made]) -> Made:
        """What `make` makes of z_H alone, alike for all tokens of the answers: while decoding it is made once.

        With gradient it is made anew, because a graph is spent by its backward pass.
        """
        if torch.is_grad_enabled():
            return make()
        if name not in self._kept:
            self._kept[name] = make()
        return self._kept[name]  # type: ignore[return-value]  # what `make` returned under this name


@dataclass
class Slots:
    """The positions that receive the injection: the last prompt token and those after it."""

    hidden: Tensor  # (B, T, D) the LLM's final hidden states
    embedded: Tensor  # (B, T, D) embedding of the token at each position, the one just read or emitted
    positions: Tensor  # (B, T) int64
    allowed: Tensor | None = None  # (B, T) bool, False before the last prompt token; None: all may be injected

    def rows(self, index: Tensor) -> Slots:
        """The positions of the examples that `index` (bool or int, (B,)) selects."""
        allowed = None if self.allowed is None else self.allowed[index]
        return Slots(self.hidden[index], self.embedded[index], self.positions[index], allowed)

    def seen(self, sees: str = HIDDEN_TOO) -> Tensor:
        """(B, T, 2 D) float32, what an injector sees of each position beside z_H; with `embed` (B, T, D), the token."""
        if sees == "embed":
            return rms_norm(self.embedded.float())
        both = torch.stack([self.hidden.float(), self.embedded.float()], dim=-2)
        return rms_norm(both).flatten(-2)


def seen_width(width: int, sees: str) -> int:
    """Channels of `Slots.seen`. Raises ValueError for another name than `SEES`."""
    if sees not in SEES:
        raise ValueError(f"injector_sees must be {' or '.join(SEES)}, got {sees!r}")
    return width if sees == "embed" else 2 * width


def _check_width(slots: Slots, width: int) -> None:
    """Raises ValueError when the LLM is not as wide as the one the injector was made for."""
    if slots.hidden.shape[-1] != width:
        raise ValueError(
            f"injector expects hidden width {width}, got {slots.hidden.shape[-1]}; "
            "was this checkpoint trained on another base model?"
        )


class InjectorGRB(nn.Module):
    """Gated residual bias: one vector from z_H (last and mean state), through a gate that also sees the token's state.

    The gate is a sigmoid per channel of the LLM's width, so positions differ; `gate_init` is its logit at the start.
    `width` is D, `d` the HRM's, `sees` one of `SEES`; `heads` and `mem` have no effect and are taken because both
    injectors are made alike.
    """

    def __init__(self, width: int, d: int, heads: int, gate_init: float = 0.0, mem: int = 0,
                 sees: str = HIDDEN_TOO):
        super().__init__()
        self.width = width
        self.sees = sees
        self.token = linear(seen_width(width, sees), d)
        self.gate = linear(3 * d, width)
        self.gate_bias = nn.Parameter(torch.full((width,), float(gate_init)))
        self.readout = SwiGLU(2 * d, d, hidden=8 * d // 3)
        self.out = zero_linear(d, width)

    def forward(self, slots: Slots, thought: Thought) -> Tensor:
        """(B, T, D) bias to add to the hidden states."""
        _check_width(slots, self.width)

        summary, bias = thought.once("grb", lambda: self._summary_and_bias(thought))

        # The gate decides at each position, by channel, how much of the bias enters.
        token = self.token(slots.seen(self.sees))
        seen = torch.cat([token, repeat(summary, "B d -> B T d", T=token.shape[1])], dim=-1)
        gate = torch.sigmoid(self.gate(seen) + self.gate_bias)
        return gate * rearrange(bias, "B D -> B 1 D")

    def _summary_and_bias(self, thought: Thought) -> tuple[Tensor, Tensor]:
        """(B, 2 d) what the prompt's thought comes to, and (B, D) the bias made of it, alike for every position."""
        mask = thought.context.mask
        summary = torch.cat([last_state(thought.z_high, mask), mean_state(thought.z_high, mask)], dim=-1)
        return summary, self.out(rms_norm(self.readout(summary)))


class InjectorCAB(nn.Module):
    """Cross-attention bridge: each answer position attends to z_H, with its place and the token just emitted as query.

    Queries and keys carry RoPE at the tokens' positions. With `mem` > 0 that many learned queries first pool z_H into
    memory tokens, which have no positions. The readout is a SwiGLU over [query, attended], not a linear map: worth
    ten points in the experiments this design follows. A learned scalar gate starts at `gate_init`. `width` is D, `d`
    the HRM's width, which `heads` divides, `sees` one of `SEES`.
    """

    def __init__(self, width: int, d: int, heads: int, gate_init: float = 1.0, mem: int = 0,
                 sees: str = HIDDEN_TOO):
        super().__init__()
        self.width = width
        self.heads = heads
        self.head_dim = d // heads
        self.sees = sees
        self.query_in = linear(seen_width(width, sees), d)
        self.query = linear(d, d)
        self.key_value = linear(d, 2 * d)
        self.readout = SwiGLU(2 * d, d, hidden=8 * d // 3)
        self.gate = nn.Parameter(torch.tensor(float(gate_init)))
        self.out = zero_linear(d, width)
        self.mem = mem
        if mem:
            self.memory = nn.Parameter(torch.randn(mem, d))
            self.memory_key_value = linear(d, 2 * d)

    def forward(self, slots: Slots, thought: Thought) -> Tensor:
        """(B, T, D) bias to add to the hidden states."""
        _check_width(slots, self.width)
        position = rms_norm(self.query_in(slots.seen(self.sees)))
        query = self._split(self.query(position))

        # Memory tokens stand nowhere in the text, so neither side is rotated.
        key, value = thought.once("cab", lambda: self._read(thought))
        if not self.mem:
            query = rotate(query, *rope(slots.positions, self.head_dim))
        attended = attend(query, key, value, None if self.mem else thought.context.keys)

        attended = rearrange(attended, "B h T e -> B T (h e)")
        readout = self.readout(torch.cat([position, attended], dim=-1))
        return self.gate * self.out(rms_norm(readout))

    def _read(self, thought: Thought) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, S, e) of z_H, or (B, h, m, e) of the memory tokens, as `attend` takes them."""
        if self.mem:
            return self._keys_values(self.key_value, self._memory(thought))

        key, value = self._keys_values(self.key_value, thought.z_high)
        key = rotate(key, thought.context.cos, thought.context.sin)

        # As `attend` reads them on a CPU, and one behind the other in memory: every token of an answer reads them all.
        if key.device.type == "cpu" and not torch.is_grad_enabled():
            return key.float().contiguous(), value.float().contiguous()
        return key, value

    def _split(self, x: Tensor) -> Tensor:
        """(B, S, d) -> (B, h, S, e)."""
        return rearrange(x, "B S (h e) -> B h S e", h=self.heads)

    def _keys_values(self, projection: nn.Linear, z: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values (B, h, S, e) of z (B, S, d)."""
        return rearrange(projection(z), "B S (two h e) -> two B h S e", two=2, h=self.heads).unbind(0)

    def _memory(self, thought: Thought) -> Tensor:
        """(B, m, d): the learned memory queries after reading z_H."""
        query = self._split(repeat(self.memory, "m d -> B m d", B=len(thought.z_high)))
        key, value = self._keys_values(self.memory_key_value, thought.z_high)
        pooled = attend(query.to(key.dtype), key, value, thought.context.keys)
        return rms_norm(rearrange(pooled, "B h m e -> B m (h e)"))


class VocabularyBias(nn.Module):
    """Optional gated bias on the logits, from the last state of z_H: (B, 1, V), zero at step 0."""

    def __init__(self, width: int, d: int, vocabulary: int, sees: str = HIDDEN_TOO):
        super().__init__()
        self.sees = sees
        self.gate = linear(seen_width(width, sees), 1)
        self.out = zero_linear(d, vocabulary)

    def forward(self, slots: Slots, thought: Thought) -> Tensor:
        """(B, T, V) bias to add to the logits."""
        bias = thought.once("vocabulary", lambda: self.out(last_state(thought.z_high, thought.context.mask)))
        return torch.sigmoid(self.gate(slots.seen(self.sees))) * rearrange(bias, "B V -> B 1 V")


class PromptGate(nn.Module):
    """Decides for each prompt whether anything is written for it (`--prompt_gate`).

    It is open inside a ball around the prompts of the tasks. A prompt unlike all that training showed lies outside,
    whatever it is; a linear boundary would open for half of such prompts. `channels` is the width of the features that
    HRM reads.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.look = linear(2 * channels, GATE_WIDTH)
        self.centre = nn.Parameter(torch.zeros(GATE_WIDTH))

    def forward(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B,) distances from the tasks' prompts of features (B, S, k D), readable where mask (B, S) is True."""
        # In float32 always: the answer must not depend on how a number near the border was rounded.
        with torch.autocast(features.device.type, enabled=False):
            features = features.float()
            seen = torch.cat([last_state(features, mask), mean_state(features, mask)], dim=-1)
            return (self.look(seen) - self.centre).square().mean(dim=-1)

    def opened(self, features: Tensor, mask: Tensor) -> Tensor:
        """(B,) bool, for which prompts something is written."""
        return within_radius(self(features, mask))


def within_radius(distance: Tensor) -> Tensor:
    """(B,) bool, for which of the gate's distances (B,) something is written."""
    return distance < GATE_RADIUS


INJECTORS = {"grb": InjectorGRB, "cab": InjectorCAB}
