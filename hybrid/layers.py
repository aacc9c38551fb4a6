"""Layers of the hybrid: attention, Transformer and Mamba2 encoders, the decoder with its gated branch.

Shapes: B batch, S encoder tokens, T decoder tokens, D width of encoder and decoder, h heads, e = D / h, m memory
tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from einops import rearrange
from torch import Tensor, nn
from transformers import DynamicCache, EncoderDecoderCache

from engine.attention import attend, key_mask, rope, rotate
from hrm_blocks import SwiGLU, linear, rms_norm, zero_linear

MAMBA_CHUNK = {"cpu": 32}  # pure torch works in chunks whose cost grows with their square; kernels like 256
MAMBA_HEAD = 32

Keys = tuple[Tensor, Tensor]  # keys and values of attention, each (B, h, positions, e)


# --- attention --------------------------------------------------------------------------------------------------------


class CrossAttention(nn.Module):
    """Multi-head attention of x (B, T, width) over a memory (B, S, memory_width); norms both. -> (B, T, width).

    With `zero` its output projection starts at zero.
    """

    def __init__(self, width: int, memory_width: int, heads: int, zero: bool = False):
        super().__init__()
        self.heads = heads
        self.query = linear(width, width)
        self.key_value = linear(memory_width, 2 * width)
        self.out = zero_linear(width, width) if zero else linear(width, width)

    def keys(self, memory: Tensor) -> Keys:
        """Keys and values of a memory: computed once, however often it is read."""
        both = self.key_value(rms_norm(memory))
        key, value = rearrange(both, "B S (two h e) -> two B h S e", two=2, h=self.heads)
        return key, value

    def forward(self, x: Tensor, keys: Keys, mask: Tensor | None = None) -> Tensor:
        """`keys` from `keys`, `mask` from `key_mask`."""
        query = rearrange(self.query(rms_norm(x)), "B T (h e) -> B h T e", h=self.heads)
        return self.out(rearrange(attend(query, *keys, mask), "B h T e -> B T (h e)"))


class SelfAttention(nn.Module):
    """Pre-norm multi-head self-attention with RoPE. (B, T, D) -> (B, T, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv = linear(width, 3 * width)
        self.out = linear(width, width)

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        mask: Tensor | None,
        cache: DynamicCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """Attends within x, and to what the cache holds.

        Args:
            x: (B, T, D).
            turn: cosine and sine (B, T, e) of the positions.
            mask: bool, broadcastable to (B, 1, T, keys); None: every key may be read.
            cache: keys and values of earlier tokens; those of x are added.
            layer: whose part of the cache it is.
        """
        query, key, value = rearrange(
            self.qkv(rms_norm(x)), "B T (three h e) -> three B h T e", three=3, h=self.heads
        )
        query = rotate(query, *turn)
        key = rotate(key, *turn)

        # Keys are stored turned, so that they need not be turned again.
        if cache is not None:
            key, value = cache.update(key, value, layer)

        return self.out(rearrange(attend(query, key, value, mask), "B h T e -> B T (h e)"))


# --- encoders ---------------------------------------------------------------------------------------------------------


class BidirectionalLayer(nn.Module):
    """Pre-norm layer in which every token reads every other. (B, S, D) -> (B, S, D)."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention = SelfAttention(width, heads)
        self.mlp = SwiGLU(width)

    def forward(self, x: Tensor, turn: tuple[Tensor, Tensor], mask: Tensor | None) -> Tensor:
        x = x + self.attention(x, turn, mask)
        return x + self.mlp(rms_norm(x))


class TransformerEncoder(nn.Module):
    """RoPE Transformer layers. Embedded tokens (B, S, D), mask (B, S), positions (B, S) -> states (B, S, D)."""

    def __init__(self, width: int, heads: int, layers: int):
        super().__init__()
        self.head_dim = width // heads
        self.layers = nn.ModuleList(BidirectionalLayer(width, heads) for _ in range(layers))

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        turn = rope(positions, self.head_dim)
        keys = key_mask(mask)
        for layer in self.layers:
            x = layer(x, turn, keys)
        return rms_norm(x)


class Mamba2Encoder(nn.Module):
    """Mamba2 (arXiv 2405.21060) of transformers, same contract as `TransformerEncoder`.

    Causal: a state knows the tokens up to its own. Rows are moved to right padding for the scan, so that it does not
    matter on which side the pads stand.
    """

    def __init__(self, width: int, layers: int, state_size: int):
        super().__init__()
        from transformers import Mamba2Config, Mamba2Model

        # Its heads are as wide as the inner width allows.
        inner = 2 * width
        head_dim = next(size for size in (MAMBA_HEAD, 16, 8, 4, 2) if inner % size == 0)
        config = Mamba2Config(
            hidden_size=width,
            num_hidden_layers=layers,
            num_heads=inner // head_dim,
            head_dim=head_dim,
            expand=2,
            state_size=state_size,
            n_groups=1,
            vocab_size=1,
            use_cache=False,
            pad_token_id=None,
            bos_token_id=None,
            eos_token_id=None,
        )
        self.scan = Mamba2Model(config)
        self.scan.embeddings = nn.Identity()  # tokens come embedded: a table nobody reads is not to be trained

        # Its own initialisation, deviation 0.1, is for wide models.
        for module in self.scan.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=module.in_features**-0.5)

    def forward(self, x: Tensor, mask: Tensor, positions: Tensor) -> Tensor:
        for layer in self.scan.layers:
            layer.mixer.chunk_size = MAMBA_CHUNK.get(x.device.type, 256)

        # Readable columns first, in their order.
        mask = mask.bool()
        order = torch.argsort((~mask).to(torch.int8), dim=1, stable=True)
        moved = x.gather(1, order[..., None].expand_as(x))
        moved_mask = mask.gather(1, order).to(torch.int64)
        states = self.scan(inputs_embeds=moved, attention_mask=moved_mask).last_hidden_state

        # Every state goes back to its column.
        back = torch.empty_like(states).scatter_(1, order[..., None].expand_as(states), states)
        return rms_norm(back)


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

    def forward(
        self,
        x: Tensor,
        turn: tuple[Tensor, Tensor],
        causal: Tensor | None,
        states: Tensor,
        states_mask: Tensor | None,
        memory: Memory | None,
        cache: EncoderDecoderCache | None,
        layer: int,
    ) -> Tensor:
        """One layer over the decoder's tokens.

        Args:
            x: (B, T, D).
            turn: cosine and sine (B, T, e) of the tokens' positions.
            causal: bool, broadcastable to (B, 1, T, past + T): which of the decoder's tokens each may read.
            states: the encoder's, (B, S, D).
            states_mask: from `key_mask`, of the encoder's tokens.
            memory: None: there is none, and the branch is not run.
            cache: of earlier tokens.
            layer: this layer's number in the cache.
        """
        own_cache = cache.self_attention_cache if cache is not None else None
        x = x + self.attention(x, turn, causal, own_cache, layer)

        encoder_keys, memory_keys = self._keys(states, memory, cache, layer)
        heard = self.from_encoder(x, encoder_keys, states_mask)
        if memory is not None:
            thought = self.from_memory(x, memory_keys)
            heard = heard + memory.gate[:, None, None].to(thought.dtype) * thought
        x = x + heard

        return x + self.mlp(rms_norm(x))

    def _keys(
        self, states: Tensor, memory: Memory | None, cache: EncoderDecoderCache | None, layer: int
    ) -> tuple[Keys, Keys]:
        """Keys and values of the encoder's states and of the memory (no columns without one).

        A cache has one slot a layer, so it holds both in a row; every later token reads them from there.
        """
        if cache is not None and cache.is_updated.get(layer):
            kept = cache.cross_attention_cache.layers[layer]
            both = (kept.keys, kept.values)
        else:
            both = self.from_encoder.keys(states)
            if memory is not None:
                pairs = zip(both, self.from_memory.keys(memory.tokens), strict=True)
                both = tuple(torch.cat(pair, dim=2) for pair in pairs)
            if cache is not None:
                cache.cross_attention_cache.update(*both, layer)
                cache.is_updated[layer] = True

        length = states.shape[1]
        key, value = both
        return (key[:, :, :length], value[:, :, :length]), (key[:, :, length:], value[:, :, length:])


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

    def forward(
        self,
        x: Tensor,
        states: Tensor,
        states_mask: Tensor,
        memory: Memory | None = None,
        mask: Tensor | None = None,
        cache: EncoderDecoderCache | None = None,
    ) -> Tensor:
        """The decoder's states.

        Args:
            x: embedded tokens (B, T, D).
            states: the encoder's, (B, S, D).
            states_mask: (B, S), 1 at the encoder's readable tokens.
            memory: what HRM hands over; None: nothing.
            mask: (B, past + T), 1 at the decoder's own readable tokens; None: all of them.
            cache: of the `past` tokens before x.
        """
        past = cache.get_seq_length() if cache is not None else 0
        columns = torch.arange(past + x.shape[1], device=x.device)
        causal = columns[None, :] <= columns[past:, None]  # (T, past + T)
        positions = columns[None, past:]

        # With pads among the tokens positions skip them; a pad reads itself, so that its softmax stays finite.
        if mask is not None and not bool(mask.all()):
            itself = torch.eye(len(columns), dtype=torch.bool, device=x.device)[past:]
            causal = causal & (mask.bool()[:, None, None, :] | itself)
            positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, past:]

        turn = rope(positions, self.head_dim)
        keys = key_mask(states_mask)
        for index, layer in enumerate(self.layers):
            x = layer(x, turn, causal, states, keys, memory, cache, index)
        return self.out(rms_norm(x))
