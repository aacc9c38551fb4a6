"""Attention over few keys, and rotary positions.

Shapes: B batch, h heads, T queries, S keys, e channels of a head.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to so many keys, plain products in bf16 on a CPU take half as long as torch's kernel in float32. Measured on AMD
# EPYC with bf16 instructions at 25, 45 and 140 keys, forward and backward; at 400 keys they take twice as long.
FEW_KEYS = 192


def rope(positions: Tensor, head_dim: int, theta: float = 10_000.0) -> tuple[Tensor, Tensor]:
    """Cosine and sine (B, S, e) of rotary position embedding at integer `positions` (B, S), in float32."""
    frequency = theta ** (-torch.arange(0, head_dim, 2, device=positions.device, dtype=torch.float32) / head_dim)
    angle = positions.float()[..., None] * frequency
    angle = torch.cat([angle, angle], dim=-1)
    return angle.cos(), angle.sin()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Applies rotary embedding: x (..., B, h, S, e) with cos, sin (B, S, e) of `rope`; keeps x's dtype."""
    # Both halves of cos and sin are alike, so half of each will do.
    half = x.shape[-1] // 2
    cos, sin = (part[:, None, :, :half].to(x.dtype) for part in (cos, sin))
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def key_mask(mask: Tensor | None) -> Tensor | None:
    """(B, 1, 1, S) bool for `attend` from mask (B, S); None where every key may be read, the faster call.

    A row without any readable key reads all of them, so that softmax stays finite; nobody reads its result.
    """
    if mask is None:
        return None
    mask = mask.bool()
    readable = mask | ~mask.any(dim=1, keepdim=True)
    return None if bool(readable.all()) else readable[:, None, None, :]


def attend(query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None) -> Tensor:
    """Scaled dot-product attention (B, h, T, e) over readable `keys` (B, 1, 1, S), in the query's dtype.

    On a CPU torch's own kernel runs in float32: in bf16 its backward takes about five times as long. Few keys in bf16
    are attended to by plain products, with the softmax in float32.
    """
    if query.device.type != "cpu":
        return F.scaled_dot_product_attention(query, key, value, attn_mask=keys)
    with torch.autocast("cpu", enabled=False):
        if query.dtype == key.dtype == value.dtype == torch.bfloat16 and key.shape[-2] <= FEW_KEYS:
            return _by_products(query, key, value, keys)
        mixed = F.scaled_dot_product_attention(query.float(), key.float(), value.float(), attn_mask=keys)
    return mixed.to(query.dtype)


def _by_products(query: Tensor, key: Tensor, value: Tensor, keys: Tensor | None) -> Tensor:
    """`attend` without a kernel of its own; softmax in float32, everything else in the inputs' dtype."""
    scores = torch.matmul(query * query.shape[-1] ** -0.5, key.transpose(-1, -2))
    if keys is not None:
        scores = scores.masked_fill(~keys, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32)
    return torch.matmul(weights.to(value.dtype), value)
