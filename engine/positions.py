"""Positions that a mask gives to tokens, and states read under a mask.

Shapes: B batch, N tokens, S prompt tokens, d width.
"""

from __future__ import annotations

import torch
from einops import reduce
from torch import Tensor


def token_positions(attention_mask: Tensor) -> Tensor:
    """(B, N) positions from the mask's cumulative sum, in training, caching and decoding alike."""
    return (attention_mask.cumsum(dim=1) - 1).clamp(min=0)


def last_column(mask: Tensor) -> Tensor:
    """(B,) index of the last True of mask (B, S); 0 in a row without any."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return (mask * columns).amax(dim=1)


def last_state(z: Tensor, mask: Tensor) -> Tensor:
    """(B, d): z (B, S, d) at the last readable column of each row."""
    return z[torch.arange(len(z), device=z.device), last_column(mask)]


def relative_change(before: Tensor, after: Tensor, mask: Tensor | None = None) -> Tensor:
    """(B,) of ||after - before|| / ||after||, norms over the readable positions of (B, S, d); no mask: over all."""
    before, after = before.float(), after.float()
    if mask is not None:
        weight = mask[..., None].float()
        before, after = before * weight, after * weight
    size = after.flatten(1).norm(dim=1)
    return (after - before).flatten(1).norm(dim=1) / size.clamp(min=1e-12)


def mean_state(z: Tensor, mask: Tensor) -> Tensor:
    """(B, d): mean of z (B, S, d) over readable columns; zeros in a row without any."""
    weight = mask[..., None].to(z.dtype)
    count = reduce(weight, "B S one -> B one", "sum").clamp(min=1)
    return reduce(z * weight, "B S d -> B d", "sum") / count
