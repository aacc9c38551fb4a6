"""Layers of the hybrid: pre-norm Transformer layers, encoders, the HRM over token banks, bridges, the gated decoder.

Shapes: B batch, S encoder tokens, T decoder tokens, D width of encoder and decoder, d HRM width, h heads, e = D / h,
H and L slots of the slow and the fast bank, m memory tokens, C cycles.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from hrm_blocks import (
    HALT_BIAS,
    HBlock,
    LBlock,
    SwiGLU,
    attend,
    first_call_with_gradient,
    linear,
    mean_state,
    recur,
    rms_norm,
    rope,
    rotate,
)

MAMBA_CHUNK = {"cpu": 32}  # pure torch works in chunks whose cost grows with their square; kernels like 256
MAMBA_HEAD = 32
SLOT_DEVIATION = 0.5  # of slot embeddings, beside states of deviation 1


def zero_linear(fan_in: int, fan_out: int) -> nn.Linear:
    """A bias-free projection that starts at zero: the branch behind it changes nothing at first."""
    projection = nn.Linear(fan_in, fan_out, bias=False)
    nn.init.zeros_(projection.weight)
    return projection


def key_mask(mask: Tensor | None) -> Tensor | None:
    """(B, 1, 1, S) bool for `attend` from mask (B, S); None where every key may be read, the faster call.

    A row without any readable key reads all of them, so that softmax stays finite.
    """
    if mask is None:
        return None
    mask = mask.bool()
    readable = mask | ~mask.any(dim=1, keepdim=True)
    return None if bool(readable.all()) else readable[:, None, None, :]


# --- attention --------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, width) over a memory (B, S, memory_width); norms both. -> (B, T, width)."""

    def __init__(self, width: int, memory_width: int, heads: int, zero: bool = False):
        super().__init__()
        self.heads = heads
        self.query = linear(width, width)
        self.key_value = linear(memory_width, 2 * width)
        self.out = zero_linear(width, width) if zero else linear(width, width)

    def keys(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values, each (B, h, S, e): computed once per memory, however often it is read."""
        key, value = rearrange(
            self.key_value(rms_norm(memory)), "B S (two h e) -> two B h S e", two=2, h=self.heads
        )
        return key, value

    def forward(self, x: Tensor, keys: tuple[Tensor, Tensor], mask: Tensor | None = None) -> Tensor:
        query = rearrange(self.query(rms_norm(x)), "B T (h e) -> B h T e", h=self.heads)
        return self.out(rearrange(attend(query, *keys, mask), "B h T e -> B T (h e)"))


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention with RoPE. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None, cache: DynamicCache | None = None,
                layer: int = 0) -> Tensor:
        """`turn` cosine and sine (B, T, e) of the positions; `mask` bool, broadcastable to (B, 1, T, keys)."""
        q, k, v = rearrange(self.qkv(rms_norm(x)), "B T (three h e) -> three B h T e", three=3, h=self.heads)
        q, k = rotate(q, *turn), rotate(k, *turn)
        if cache is not None:
            k, v = cache.update(k, v, layer)
        return self.out(rearrange(attend(q, k, v, mask), "B h T e -> B T (h e)"))


class EncoderLayer(nn.Module):
    """Pre-norm bidirectional layer. (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attention(x, turn, mask)
        return x + self.mlp(rms_norm(x))


# --- encoders ---------------------------------------------------------------------------------------------------------


class TransformerEncoder(nn.Module):
    """RoPE Transformer layers. Embedded tokens (B, S, D), mask (B, S), positions (B, S) -> states (B, S, D)."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.head_dim = width // heads
        self.layers = nn.ModuleList(EncoderLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        turn, keys = rope(positions, self.head_dim), key_mask(mask)
        for layer in self.layers:
            x = layer(x, turn, keys)
        return rms_norm(x)


class Mamba2Encoder(nn.Module):
    """Mamba2 (arXiv 2405.21060) of transformers, same contract as `TransformerEncoder`.

    Causal: a state knows the tokens up to its own. Rows are moved to right padding for the scan, so that where the
    pads stand makes no difference.
    """

    def __init__(self, width: int, layers: int, state_size: int):
        super().__init__()
        from transformers import Mamba2Config, Mamba2Model

        inner = 2 * width
        head_dim = next(size for size in (MAMBA_HEAD, 16, 8, 4, 2) if inner % size == 0)
        config = Mamba2Config(
            hidden_size=width, num_hidden_layers=layers, num_heads=inner // head_dim, head_dim=head_dim, expand=2,
            state_size=state_size, n_groups=1, vocab_size=1, use_cache=False, pad_token_id=None, bos_token_id=None,
            eos_token_id=None,
        )
        self.scan = Mamba2Model(config)
        self.scan.embeddings = nn.Identity()  # tokens come embedded: a table nobody reads is not to be trained
        for module in self.scan.modules():
            if isinstance(module, nn.Linear):  # its own initialisation, deviation 0.1, is for wide models
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        for layer in self.scan.layers:
            layer.mixer.chunk_size = MAMBA_CHUNK.get(x.device.type, 256)
        mask = mask.bool()
        order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)  # readable columns first, in their order
        moved = x.gather(1, order[..., None].expand_as(x))
        states = self.scan(inputs_embeds=moved, attention_mask=mask.gather(1, order).to(torch.int64)).last_hidden_state
        back = torch.empty_like(states).scatter_(1, order[..., None].expand_as(states), states)
        return rms_norm(back)


# --- HRM over token banks ---------------------------------------------------------------------------------------------


@dataclass
class Cycle:
    """What one cycle left: the slow bank and the logit of "this is enough"."""

    z_high: Tensor  # (B, H, d)
    halt_logits: Tensor  # (B,)


class BankCore(nn.Module):
    """HRM (arXiv 2506.21734, section 2) whose states are banks of tokens, whatever the length of the input.

    A cycle is `l_steps` times `l = z_L + s_L; z_L = L(l + x(l) + read_high(l))` with `x = read_input`, then
    `h = z_H + s_H; z_H = H(h + read_low(h))`. Each read is cross-attention with a norm behind it, so that what is heard
    weighs as much as what is held: attention over a hundred tokens is nearly their mean, and z_H would soon be the same
    for every input. s are learned slot embeddings: HRM's x tells its positions apart in each call, and without its like
    all slots of a bank come to hold one vector. Each cycle is a segment: with a horizon other than `full` its state is
    handed on detached. Initial states are fixed vectors, one per slot (truncated normal, deviation 1), saved and not
    trained.
    """

    def __init__(self, d: int, heads: int, width: int, h_len: int, l_len: int, h_layers: int, l_layers: int,
                 h_cycles: int, l_steps: int, horizon: str):
        super().__init__()
        first_call_with_gradient(horizon, l_steps)
        self.head_dim, self.h_cycles, self.l_steps, self.horizon = d // heads, h_cycles, l_steps, horizon
        self.h_block, self.l_block = HBlock(d, heads, h_layers), LBlock(d, heads, l_layers)
        self.read_high, self.read_low = CrossAttention(d, d, heads), CrossAttention(d, d, heads)
        self.read_input = CrossAttention(d, width, heads)
        self.halt = nn.Linear(d, 1)
        nn.init.zeros_(self.halt.weight)
        nn.init.constant_(self.halt.bias, HALT_BIAS)
        for name, slots in (("z_high_init", h_len), ("z_low_init", l_len)):
            self.register_buffer(name, nn.init.trunc_normal_(torch.empty(slots, d), std=1.0, a=-2.0, b=2.0))
        self.high_slots = nn.Parameter(SLOT_DEVIATION * torch.randn(h_len, d))
        self.low_slots = nn.Parameter(SLOT_DEVIATION * torch.randn(l_len, d))

    def start(self, batch: int) -> tuple[Tensor, Tensor]:
        """(z_high, z_low) before the first cycle, (B, H, d) and (B, L, d)."""
        return self.z_high_init.expand(batch, -1, -1), self.z_low_init.expand(batch, -1, -1)

    def read(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of the encoder's states (B, S, D), once for all cycles."""
        return self.read_input.keys(states)

    def cycle(self, z_high: Tensor, z_low: Tensor, source: tuple[Tensor, Tensor], mask: Tensor | None
              ) -> tuple[Tensor, Tensor]:
        """One cycle; `source` from `read`, `mask` from `key_mask`. Returns (z_high, z_low)."""
        if self.horizon != "full":
            z_high, z_low = z_high.detach(), z_low.detach()
        turns = [SlotContext(rope(torch.arange(z.shape[1], device=z.device)[None], self.head_dim))
                 for z in (z_high, z_low)]

        def step_low(low: Tensor, high: Tensor) -> Tensor:
            low = low + self.low_slots
            x = rms_norm(self.read_input(low, source, mask))
            return self.l_block(low + x + rms_norm(self.read_high(low, self.read_high.keys(high))), turns[1])

        def step_high(high: Tensor, low: Tensor) -> Tensor:
            high = high + self.high_slots
            return self.h_block(high + rms_norm(self.read_low(high, self.read_low.keys(low))), turns[0])

        return recur(step_low, step_high, z_high, z_low, self.l_steps, horizon=self.horizon)

    def halt_logits(self, z_high: Tensor) -> Tensor:
        """(B,) from the mean of the slow bank, which the head only reads: optimizers that normalise gradients would let
        its small loss reshape the whole bank wherever the gate is nearly shut."""
        return self.halt(z_high.detach().mean(dim=1)).squeeze(-1)


class SlotContext:
    """The context of a bank for `hrm_blocks.Attention`: every slot is readable."""

    keys = None

    def __init__(self, turn: tuple[Tensor, Tensor]):
        self.cos, self.sin = turn


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
    """(B,) in (0, 1): how much of the memory an example lets in, from z_H's mean and the encoder's pooled state.

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


# --- decoder ----------------------------------------------------------------------------------------------------------


@dataclass
class Memory:
    """What HRM hands to the decoder."""

    tokens: Tensor  # (B, m, D)
    gate: Tensor  # (B,) the gate times its scale


class DecoderLayer(nn.Module):
    """Pre-norm: causal self-attention, then `attn(encoder) + gate * attn(memory)` in two separate softmaxes, SwiGLU.

    Separate, so that a shut gate leaves exactly the decoder without memory: in a shared softmax even zeroed memory
    tokens would take mass from the encoder's.
    """

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.from_encoder = CrossAttention(width, width, heads)
        self.from_memory = CrossAttention(width, width, heads, zero=True)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], causal: Tensor | None, states: Tensor,
                states_mask: Tensor | None, memory: Memory | None, cache: EncoderDecoderCache | None, layer: int
                ) -> Tensor:
        own = cache.self_attention_cache if cache is not None else None
        x = x + self.attention(x, turn, causal, own, layer)
        of_encoder, of_memory = self._keys(states, memory, cache, layer)
        heard = self.from_encoder(x, of_encoder, states_mask)
        if memory is not None:
            said = self.from_memory(x, of_memory)
            heard = heard + memory.gate[:, None, None].to(said.dtype) * said
        x = x + heard
        return x + self.mlp(rms_norm(x))

    def _keys(self, states: Tensor, memory: Memory | None, cache: EncoderDecoderCache | None, layer: int
              ) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Keys and values of the encoder's states and of the memory. A cache, which has one slot a layer, keeps both
        in a row; every later token reads them from there."""
        if cache is not None and cache.is_updated.get(layer):
            kept = cache.cross_attention_cache.layers[layer]
            both = kept.keys, kept.values
        else:
            both = self.from_encoder.keys(states)
            if memory is not None:
                pairs = zip(both, self.from_memory.keys(memory.tokens), strict=True)
                both = tuple(torch.cat(pair, dim=2) for pair in pairs)
            if cache is not None:
                cache.cross_attention_cache.update(*both, layer)
                cache.is_updated[layer] = True
        length = states.shape[1]
        return tuple(part[:, :, :length] for part in both), tuple(part[:, :, length:] for part in both)


class Decoder(nn.Module):
    """Causal Transformer over embedded tokens (B, T, D), with or without memory. -> (B, T, D) for the output embedding.

    A last projection stands before it: with tied tables the residual stream would otherwise begin by predicting the
    very token that was read.
    """

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.head_dim = width // heads
        self.layers = nn.ModuleList(DecoderLayer(width, heads) for _ in range(layers))
        self.out = linear(width, width)

    def forward(self, x: Tensor, states: Tensor, states_mask: Tensor, memory: Memory | None = None,
                mask: Tensor | None = None, cache: EncoderDecoderCache | None = None) -> Tensor:
        """`mask` (B, past + T) marks the decoder's own readable tokens; None: all of them."""
        past = cache.get_seq_length() if cache is not None else 0
        columns = torch.arange(past + x.shape[1], device=x.device)
        causal = columns[None, :] <= columns[past:, None]  # (T, past + T)
        positions = columns[None, past:]
        if mask is not None and not bool(mask.all()):
            itself = torch.eye(len(columns), dtype=torch.bool, device=x.device)[past:]  # a pad's softmax stays finite
            causal = causal & (mask.bool()[:, None, None, :] | itself)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]
        turn, keys = rope(positions, self.head_dim), key_mask(states_mask)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, causal, states, keys, memory, cache, index)
        return self.out(rms_norm(x))


def pooled_state(states: Tensor, mask: Tensor) -> Tensor:
    """(B, D): mean of the encoder's states over readable tokens."""
    return mean_state(states, mask)
